"""A bucket on loopback: converting from it in place, against downloading first, and against the server's maximum.

``python -m benchmarks.stores [GB [ROUNDS]]``. The server is moto's, in a process of its own that shares the cores, so
the meaningful figure is the ratio to the server's own maximum: reading all ranges and throwing them away. moto is slow,
and slower with longer files, which it copies completely for each range; if nginx is installed, it serves the same
files, too. Opening is measured against a server that takes 20 ms for each request.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measuring import interleaved, keep, show
from fp8ckpt import convert, open_checkpoint, sample
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
from fp8ckpt.stores.ahead import REQUEST

BUCKET, PREFIX = "benchmark", "fp8"
ROUNDS = 3
AT_ONCE = 12
LATENCY = 0.02  # seconds
FILES = 163
_SERVER = """
import logging, threading
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
threading.Event().wait()
"""


_OPENED = """
import sys, threading
from pathlib import Path
from tests.stores.servers import Server, web
server = Server(web({{f"x/{{file.name}}": file.read_bytes() for file in Path({source!r}).iterdir()}}))
server.latency = {latency}
print(server.url, flush=True)
threading.Event().wait()
"""
_NGINX = """
daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;
events {{}}
http {{
  access_log off; sendfile on; client_body_temp_path {work}/body; proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi; uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; }}
}}
"""
_LOADING = """
import json, sys, time
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty
from fp8ckpt import FP8StorageReader, open_checkpoint
from fp8ckpt.stores import s3
fetched, get = [0], s3.S3Objects.get
def counted(self, name, start, stop, stat):
    fetched[0] += stop - start
    return get(self, name, start, stop, stat)
s3.S3Objects.get = counted
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
checkpoint = open_checkpoint(sys.argv[1])
tensors = [t for t in checkpoint.quantized if t.shape[0] % dist.get_world_size() == 0]
state = {t.name: empty(*t.shape, dtype=torch.bfloat16, device_mesh=mesh, placements=[Shard(0)]) for t in tensors}
fetched[0], begun = 0, time.perf_counter()
dcp.load(state, storage_reader=FP8StorageReader(checkpoint))
row = {"seconds": time.perf_counter() - begun, "fetched": fetched[0], "bytes": sum(t.weight.nbytes for t in tensors)}
rows = [None] * dist.get_world_size()
dist.all_gather_object(rows, row)
if dist.get_rank() == 0:
    print(json.dumps(rows))
"""


def _sizes(gigabytes: float) -> Mistral3Sizes:
    """About so many GB of FP8, in layers of 0.1 GB."""
    return Mistral3Sizes(
        layers=max(1, round(gigabytes * 10)), hidden=4096, intermediate=6144, heads=32, kv_heads=8, head_dim=128,
        vocabulary=4096, vision_layers=1,
    )  # fmt: skip


def _ranges(source: Path, get: Callable[[str, str], Any]) -> Callable[[], None]:
    """The server's own maximum: every byte in parallel ranges, thrown away."""
    wanted = [
        (file.name, f"bytes={start}-{min(start + REQUEST, file.stat().st_size) - 1}")
        for file in source.iterdir()
        for start in range(0, file.stat().st_size, REQUEST)
    ]

    def fetch(part: tuple[str, str]) -> None:
        body = get(*part)
        while body.read(1 << 20):
            pass

    def run() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(fetch, wanted))

    return run


def _converting(work: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    import boto3

    source = sample(work / "fp8", _sizes(gigabytes), files=max(4, round(8 * gigabytes)))
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for file in source.iterdir():
        client.upload_file(str(file), BUCKET, f"{PREFIX}/{file.name}")
    size = sum(file.stat().st_size for file in source.iterdir())
    number = iter(range(1000))

    def there() -> None:
        convert(f"s3://{BUCKET}/{PREFIX}", work / f"out{next(number)}")

    def download_first() -> None:
        near = work / f"near{next(number)}"
        near.mkdir()
        for file in source.iterdir():
            client.download_file(BUCKET, f"{PREFIX}/{file.name}", str(near / file.name))
        convert(near, work / f"out{next(number)}")

    def upload() -> None:
        convert(source, f"s3://{BUCKET}/out{next(number)}")

    def near() -> None:
        convert(source, work / f"out{next(number)}")

    rows = interleaved(
        {
            "convert s3://": there,
            "download, then convert": download_first,
            "convert to s3://": upload,
            "the server's own maximum": _ranges(
                source, lambda name, part: client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Range=part)["Body"]
            ),
            "convert, of a local copy": near,
        },
        rounds,
    )
    show(f"converting {size / 1e9:.2f} GB from a bucket on loopback", rows, "convert s3://")
    return {"source_bytes": size, "rows": rows, "nginx": _converting_from_nginx(work, source)}


def _converting_from_nginx(work: Path, source: Path) -> dict[str, Any] | None:
    """The same from a server that costs next to nothing."""
    if shutil.which("nginx") is None:
        print("\nnginx is not installed, and not measured")
        return None
    import urllib3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work.chmod(0o755)
    (work / "nginx.conf").write_text(_NGINX.format(work=work, port=port, root=work))
    server = subprocess.Popen(["nginx", "-c", str(work / "nginx.conf")])
    try:
        pool = urllib3.PoolManager(maxsize=AT_ONCE, retries=urllib3.Retry(20, backoff_factor=0.1))
        url = f"http://127.0.0.1:{port}/{source.name}"
        pool.request("GET", url + "/")
        number = iter(range(1000))

        def get(name: str, part: str) -> Any:
            return pool.request("GET", f"{url}/{name}", headers={"Range": part}, preload_content=False)

        rows = interleaved(
            {
                "convert http://": lambda: convert(url, work / f"web{next(number)}"),
                "the server's own maximum": _ranges(source, get),
                "convert, of a local copy": lambda: convert(source, work / f"web{next(number)}"),
            },
            ROUNDS,
        )
        show("the same from nginx", rows, "convert http://")
        return rows
    finally:
        server.terminate()
        server.wait()


def _loading() -> dict[str, Any]:
    """Load a model of two ranks with rows sharded: the bytes that they fetched together, against those of the files."""
    code = f"import sys; sys.argv = ['', 's3://{BUCKET}/{PREFIX}']\n{_LOADING}"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    fetched, size = sum(row["fetched"] for row in rows), rows[0]["bytes"]
    seconds = max(row["seconds"] for row in rows)
    print(f"\nloading {size / 1e9:.2f} GB into rows of 2 ranks: {seconds:.2f} s, {fetched / size:.3f} of it fetched")
    return {"ranks": rows}


def _opening(work: Path) -> dict[str, Any]:
    """163 files with 20 ms a request."""
    source = sample(work / "many", DeepseekSizes(layers=20, experts=16), files=FILES)
    code = _OPENED.format(source=str(source), latency=LATENCY)
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url, seconds, cpu = server.stdout.readline().strip(), [], []
    try:
        for _ in range(ROUNDS):
            begun, used = time.perf_counter(), time.process_time()
            open_checkpoint(f"{url}/x")
            seconds.append(time.perf_counter() - begun)
            cpu.append(time.process_time() - used)
    finally:
        server.kill()
        server.wait()
    print(f"\nopening {FILES} files, {1000 * LATENCY:.0f} ms a request: {min(seconds):.2f} s (budget: 2 s)")
    print(f"  {min(cpu):.2f} s of it are this process's own; the rest is the server's, and waiting")
    return {"seconds": seconds, "own": cpu}


def main(gigabytes: float = 2.0, rounds: float = ROUNDS) -> None:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    host, port = server.stdout.readline().split()[-2:]
    os.environ.update(
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1", HF_HUB_OFFLINE="0",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
            opening = _opening(Path(work))
            converting = _converting(Path(work), gigabytes, int(rounds))
            keep("stores", {"opening": opening, "converting": converting, "loading": _loading()})
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
