"""A sweep's driver without Ray, as a process of its own: `driver.py CONFIG.json FOLDER SECONDS`.

It asks the real state for trials and reports made-up figures; two trials run side by side. It prints a line
for each trial that starts and each time that it waits.
"""

import json
import sys
import time
from pathlib import Path

from dtr_ray.config import SweepConfig
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training.reports import Report


def figure(params: dict, step: int) -> float:
    return (5 + abs(params.get("routing.alpha", 4) - 4) + params.get("routing.beta", 0)) * 1000 / (step + 100)


def main(config_path: str, folder: str, step_s: str) -> None:
    config = SweepConfig.from_dict(json.loads(Path(config_path).read_text()))
    place = Path(folder)
    save_config(config, place)
    state = SweepState(config, place)
    running: list = []
    finished = False
    while running or not finished:
        while len(running) < 2 and not finished:
            trial = state.next_trial()
            if trial == "wait":
                print(f"{time.time():.1f} waits", flush=True)
                break
            finished = trial == "finished"
            if not finished:
                print(f"{time.time():.1f} starts {trial.trial_id}", flush=True)
                running.append(trial)
        time.sleep(float(step_s))
        for trial in list(running):
            step = trial.last_step + 100
            metrics = {config.objective: figure(trial.params, step), "train_seconds": step / 100}
            if state.report(trial.trial_id, Report(step, metrics, f"checkpoints/{step:08d}", "g.png")):
                running.remove(trial)
            elif step >= 400:
                state.finish(trial.trial_id, "completed")
                running.remove(trial)
    state.close()
    print(f"done {len(state.trials)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
