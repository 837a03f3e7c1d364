"""python -m benchmarks [NAME ...]: run side-by-side measurements and record them under benchmarks/results/."""

from __future__ import annotations

import argparse
import sys

from benchmarks import engine, gpu, kernels, llamacpp, loading, modes, offload, page, people, record, speculation

BENCHMARKS = {
    module.NAME: module
    for module in (engine, gpu, kernels, llamacpp, loading, modes, offload, page, people, speculation)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"== {name} ==", flush=True)
        results = BENCHMARKS[name].run()
        if results is not None:  # else this machine lacks what it is about, and has been told so
            print(f"recorded in {record.write(name, results).name}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
