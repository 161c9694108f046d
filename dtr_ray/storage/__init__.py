"""Object storage: keeps a sweep where no machine's disk is. It knows nothing of Ray.

Code that works on folders goes on working on a folder of the machine's own disk; this package brings what is
in there to the store, and back on another machine. Each object has one writer, and is either never written
again or replaced as a whole:

| object below the sweep's address | writer | what |
| --- | --- | --- |
| `leases/WRITER.json` | driver | who runs the sweep; the highest writer does, all others are fenced off |
| `journal/WRITER/OFFSET` | driver | the journal from its beginning, in pieces |
| `sweep.json`, `identity`, `best.json`, `trials.csv`, `tracking/...` | driver | the files of that name |
| `index/TRIAL/WRITER.json` | worker | an attempt's files and where they are; the highest writer's counts |
| `trials/TRIAL/WRITER/...` | worker | an attempt's checkpoints, grids and records |

A writer is `EPOCH-TOKEN` for a driver and `EPOCH-ATTEMPT-TOKEN` for a worker, with leading zeros: a later
one is higher, so that a process that was thought dead overwrites nothing of the one that followed it.
"""
