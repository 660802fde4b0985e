"""From what a user names to the store that keeps it."""

from __future__ import annotations

from fp8ckpt.errors import UnsupportedStoreError
from fp8ckpt.stores.address import Address
from fp8ckpt.stores.remote import Objects, RemoteStore


def open_store(address: Address) -> tuple[RemoteStore, str | None]:
    """The store of a URL, listed, and the file in it where the URL names one safetensors file."""
    folder, _, name = address.rest.rstrip("/").rpartition("/")
    single = name if folder and name.endswith(".safetensors") else None
    store = RemoteStore(objects_of(address._replace(rest=folder) if single else address))
    store.files()  # or opening would find out again and again that there is nothing
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
        raise UnsupportedStoreError.of_local(address)
    from fp8ckpt.stores.other import OtherObjects

    return OtherObjects(address)
