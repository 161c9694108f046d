"""Trials on one machine share the latents that they read: one copy in memory, whatever their number."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_folders import FolderWriter, save_vae
from tiny_trials import TINY

from dtr_ray.config.base import override

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells shares of memory"),
]

NUM_TRIALS = 4
NUM_IMAGES = 16384
SHARD_IMAGES = 2048
BATCH_SIZE = 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FolderWriter]]:
    """`large`: 1 GB of latents (4 x 32 x 32, both orientations, float32); `tiny`: 8 images of them."""
    root = tmp_path_factory.mktemp("prepared")
    vae = save_vae(root / "vae")
    generator = np.random.default_rng(0)
    writers = {}
    for name, counts in (("large", [SHARD_IMAGES] * (NUM_IMAGES // SHARD_IMAGES)), ("tiny", [4, 4])):
        writers[name] = FolderWriter(root / name, counts, resolution=256)
        latents = generator.random((sum(counts), 2, 2, 4, 32, 32), np.float32)
        writers[name].latents(latents, vae).reference_of(generator.random((2000, 1280), np.float32))
        writers[name].write(checksums=False)
        del latents
    assert sum(path.stat().st_size for path in root.glob("large/latents/*")) > 2**30
    yield writers
    for path in root.glob("large/latents/*"):
        path.unlink()


def test_1_gb_of_latents_costs_four_trials_less_than_1_3_gb(
    folders: dict[str, FolderWriter], tmp_path: Path
) -> None:
    tiny = largest_share(folders["tiny"], tmp_path / "tiny", num_steps=8)
    # An epoch each: every trial reads each image, all together nearly all of them from both sides.
    large = largest_share(folders["large"], tmp_path / "large", num_steps=NUM_IMAGES // BATCH_SIZE)
    print(f"\n{NUM_TRIALS} trials: {tiny / 1e9:.3f} GB with tiny data, {large / 1e9:.3f} GB with 1 GB of it")
    # At least: all latents were read, the other's pages are counted, too.
    assert 0.9e9 < large - tiny < 1.3e9


def largest_share(writer: FolderWriter, folder: Path, num_steps: int) -> float:
    """Bytes that trials of `dtr_ray.train`, each its own process, hold at once; shared pages count once."""
    folder.mkdir()
    processes = []
    for seed in range(NUM_TRIALS):
        changes: dict[str, Any] = {
            "data": writer.data(horizontal_flip=True),
            "model.patch_size": 16,
            "diffusion.variance": "fixed_small",
            "training.seed": seed,
            "training.num_steps": num_steps,
            "training.batch_size": BATCH_SIZE,
            "training.log_every_steps": 8,
            "evaluation.every_steps": num_steps,
            "sampling.clip_denoised": False,
        }
        path = folder / f"{seed}.json"
        path.write_text(json.dumps(override(TINY, changes)))
        command = [sys.executable, "-m", "dtr_ray.train", str(path), "--output", str(folder / f"{seed}")]
        with (folder / f"{seed}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    found = 0
    try:
        while any(process.poll() is None for process in processes):
            found = max(found, sum(share_of(process.pid) for process in processes))
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
    for seed, process in enumerate(processes):
        assert process.returncode == 0, (folder / f"{seed}.log").read_text()
    return found


def share_of(pid: int) -> int:
    """A process's proportional share of memory (PSS) in bytes; 0 for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    values = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
    return int(values[0]) * 1024 if values else 0
