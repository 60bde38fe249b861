"""One target under atheris, guided by the branches it takes (https://github.com/google/atheris).

    python -m tests.fuzz.campaign TARGET CORPUS -runs=100000 [libFuzzer options]

CORPUS is a folder for inputs; the target's seeds are written into it first.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedlora"]):
    from tests.fuzz.targets import targets


def main() -> None:
    """Fuzzes; exits with an error when a promise is broken."""
    name, folder, *options = sys.argv[1:]
    target, corpus = targets()[name], Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
