"""The page about stores is executed, with its bucket and its model on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import tree
from tests.stores.conftest import BUCKET
from tests.stores.servers import Hub, Server

PAGE = Path(__file__).parents[2] / "docs" / "stores.md"


def test_the_commands_of_the_page(
    s3: Server, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bash and python block, in order, in one directory, with the clients' own variables and nothing else."""
    import boto3

    files = tree(sample_fp8)
    for name, data in files.items():
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"models/name/{name}", Body=data)
    hub = Hub(files)
    named = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {**named, "PATH": path, "HOME": str(tmp_path), "HF_ENDPOINT": hub.hub.url, "HF_TOKEN": Hub.TOKEN}
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, code in blocks:
        command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    hub.close()
