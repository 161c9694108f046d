"""A trial's process, as far as tracking sees it: `record_writer.py SWEEP_FOLDER TRIAL STEPS SECONDS`.

It logs its steps, two evaluations with pictures, tags and a parameter, and is done in so many seconds.
"""

import sys
import time
from pathlib import Path

from dtr_ray.service.records import RecordWriter, record_path


def main(folder: str, trial: str, num_steps: int, seconds: float) -> None:
    place = Path(folder)
    with RecordWriter(record_path(place, trial, "worker")) as writer:
        writer.tags({"env.device": "cpu", "attempt": "1"})
        writer.params({"model.num_parameters": str(len(trial))})
        for step in range(1, num_steps + 1):
            writer.metrics(step, {"loss": 1 / step, "learning_rate": 1e-4 * step, "images_per_s": 7.5})
            if step % (num_steps // 2) == 0:
                picture = place / "trials" / trial / f"grid_{step}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(f"{trial} {step}".encode() * 5000)
                writer.artifact(f"trials/{trial}/{picture.name}", "samples")
                writer.metrics(step, {"fd": 100 / step})
                writer.tags({"attempt": str(step)})
            time.sleep(seconds / num_steps)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
