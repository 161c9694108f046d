"""The gate between a trial and its workers: there they leave their reports, and wait for orders."""

import asyncio
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dtr_ray.service.draining import own_node

_POLL_S = 1.0

Message = dict[str, Any]


class WorkersLostError(RuntimeError):
    """A worker's process died, or Ray could not start it: nothing that the trial has done itself."""


class Gate:
    """The trial's side.

    Messages: `{"report": ...}`, or `{}` from workers that are free for a trial. Orders: `{"train": ...}`,
    `{"go_on": True}`, `{"stop": True}` to be free again, `{"leave": True}`. A gate whose process is gone
    raises WorkersLostError: the workers, who wait at it, end as well.
    """

    def __init__(self) -> None:
        # Beside this process: then both are lost together, or neither.
        here = NodeAffinitySchedulingStrategy(own_node(), soft=True)
        self.actor: Any = _Gate.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        """What the workers are given, for `exchange`."""

    def order(self, order: Message) -> None:
        """Tells the workers what to do next."""
        _answer(self.actor.order.remote(order))

    def last_order(self, order: Message) -> None:
        """As `order`; where the gate is lost the workers end by themselves."""
        with suppress(WorkersLostError):
            self.order(order)

    def next_message(self) -> Message | None:
        """The next message, or None if there is none within a second."""
        message: Message | None = _answer(self.actor.next_message.remote(_POLL_S))
        return message

    def close(self) -> None:
        """Ends its process."""
        ray.kill(self.actor)


def exchange(actor: Any, message: Message) -> Message:
    """The main worker's side: leaves a message, and returns the order that follows it."""
    order: Message = ray.get(actor.exchange.remote(message))
    return order


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        reason = str(error).partition("\n")[0]
        raise WorkersLostError(f"the process between them and their trial is lost: {reason}") from error


@ray.remote(num_cpus=0)
class _Gate:
    """Its process."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._orders: asyncio.Queue[Message] = asyncio.Queue()

    async def exchange(self, message: Message) -> Message:
        self._messages.put_nowait(message)
        return await self._orders.get()

    async def next_message(self, timeout_s: float) -> Message | None:
        try:
            return await asyncio.wait_for(self._messages.get(), timeout_s)
        except TimeoutError:
            return None

    async def order(self, order: Message) -> None:
        self._orders.put_nowait(order)
