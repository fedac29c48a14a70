"""What the registration hook costs every start of Python, and what importing the package costs.

Starts two fresh environments in turn, alike except for the start-up file, and compares the medians of the
wall time of ``python -c pass``; then times ``import lm_eval_aft`` in fresh interpreters. The last line
printed is the result as JSON; times are milliseconds.

    python scripts/bench_startup.py --rounds 100
    python scripts/bench_startup.py --quick --against OLD      # an old checkout's start against this one's
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOKED = "import sys; print(any('lm_eval_aft' in type(f).__module__ for f in sys.meta_path))"
# The share of it that is the start-up file's own work, timed inside one interpreter.
INSIDE = """
import sys, time
line = open(sys.argv[1]).read()
start = time.perf_counter()
exec(line)
print((time.perf_counter() - start) * 1e3)
"""

IMPORT = """
import time
start, cpu = time.perf_counter(), time.process_time()
import lm_eval_aft
print((time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3)
"""


def environment(folder: Path, *, hooked: bool) -> Path:
    """Create a virtual environment that can import the package, and return its interpreter."""
    venv.create(folder, with_pip=False)
    python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    (site / "_package.pth").write_text(f"{ROOT}\n")
    if hooked:
        for source in (ROOT / "startup").iterdir():
            (site / source.name).write_bytes(source.read_bytes())
    shown = subprocess.run([python, "-c", HOOKED], capture_output=True, text=True, check=True, cwd=folder)
    if shown.stdout.strip() != str(hooked):
        raise SystemExit(f"bench_startup: expected the hook to be {hooked} in {folder}")
    return python


def start(python: Path) -> float:
    """Wall time of one start of Python, in milliseconds."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="starts of each environment (default 100)")
    parser.add_argument("--quick", action="store_true", help="30 starts of each: under a minute")
    parser.add_argument("--against", type=Path, metavar="OLD", help="compare with an old checkout instead")
    options = parser.parse_args()
    if options.against:
        import against

        against.main(["startup"], options.against, 4 if options.quick else 12)
        return
    rounds = 30 if options.quick else max(30, options.rounds)

    with tempfile.TemporaryDirectory() as folder:
        plain = environment(Path(folder, "plain"), hooked=False)
        hooked = environment(Path(folder, "hooked"), hooked=True)
        without: list[float] = []
        with_hook: list[float] = []
        for number in range(rounds):
            # Which comes first alternates, so that a slow moment of the machine favours neither.
            for python in (plain, hooked) if number % 2 else (hooked, plain):
                (without if python is plain else with_hook).append(start(python))
        inside = [
            float(
                subprocess.run(
                    [plain, "-c", INSIDE, str(ROOT / "startup" / "lm_eval_aft.pth")],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(rounds)
        ]

        imports = []
        for _ in range(rounds):
            done = subprocess.run([plain, "-c", IMPORT], capture_output=True, text=True, check=True)
            imports.append(tuple(map(float, done.stdout.split())))

    pairs = [a - b for a, b in zip(with_hook, without, strict=True)]
    result = {
        "without_ms": round(statistics.median(without), 3),
        "with_ms": round(statistics.median(with_hook), 3),
        "cost_ms": round(statistics.median(with_hook) - statistics.median(without), 3),
        "median_paired_difference_ms": round(statistics.median(pairs), 3),
        "start_up_file_alone_ms": round(statistics.median(inside), 3),
        "import_package_ms": round(statistics.median(wall for wall, _ in imports), 3),
        "import_package_cpu_ms": round(statistics.median(cpu for _, cpu in imports), 3),
        "rounds": rounds,
        "python": platform.python_version(),
        "platform": sys.platform,
    }
    print(f"python -c pass: {result['without_ms']} ms without the hook, {result['with_ms']} ms with it")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
