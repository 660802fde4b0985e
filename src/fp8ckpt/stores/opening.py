"""Which store a URL is of."""

from __future__ import annotations

from fp8ckpt.errors import UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import Objects, RemoteStore


def open_store(address: Address) -> tuple[RemoteStore, str | None]:
    """Return the store of a URL, already listed, and its file if the URL names one safetensors file."""
    folder, _, name = address.rest.rstrip("/").rpartition("/")
    single = name if folder and name.endswith(".safetensors") else None
    store = RemoteStore(objects_of(address._replace(rest=folder) if single else address))
    store.files()  # an empty place is found here, once, and not again by each step of opening
    return store, single


def objects_of(address: Address) -> Objects:
    """The client of a scheme's store."""
    if address.scheme in ("s3", "s3a"):
        from fp8ckpt.stores.s3 import S3Objects

        return S3Objects(address)
    if address.scheme == "hf":
        from fp8ckpt.stores.hub import HubObjects

        return HubObjects(address)
    if address.scheme in ("http", "https"):
        from fp8ckpt.stores.http import HttpObjects

        return HttpObjects(address)
    if address.scheme in ("file", "local"):
        raise UnsupportedStoreError.of_local(file=address, rest=address.rest)
    from fp8ckpt.stores.other import OtherObjects

    return OtherObjects(address)
