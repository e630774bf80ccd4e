"""`pbc keygen`, `sign` and `verify`: who vouches for a bundle."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from pbc.bundle import Bundle, signature, trust
from pbc.bundle.keys import PRIVATE_SUFFIX, PUBLIC_SUFFIX, generate, read_keys
from pbc.bundle.keys import sign as signed_with
from pbc.bundle.sealing import add_signature
from pbc.errors import UsageError

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("name", type=_PATH)
def keygen(name: Path) -> None:
    """Make a pair of keys: NAME.key, which signs bundles, and NAME.pub, which verifies them.

    Keep NAME.key to yourself. Devices are given NAME.pub: PBC_KEYS names files of public keys, or
    folders of them.
    """
    key = generate(name)
    click.echo(f"wrote {name}{PRIVATE_SUFFIX} (keep it secret) and {name}{PUBLIC_SUFFIX}")
    click.echo(f"key {key.identity}")


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--key", type=_PATH, required=True, metavar="NAME.key", help="The key that signs.")
@click.option("--serial", type=click.IntRange(0, signature.MOST_SERIAL),
              help="Grows with each bundle.  [default: the time, in seconds]")  # fmt: skip
def sign(bundle: Path, key: Path, serial: int | None) -> None:
    """Sign BUNDLE, in place; signatures of other keys stay.

    A device that trusts the key refuses a bundle of a smaller serial than the one it has.
    """
    opened = Bundle.open(bundle)
    opened.verify()
    made = signed_with(key, opened.digest, int(time.time()) if serial is None else serial)
    add_signature(opened, made)
    click.echo(f"signed {bundle} with key {made.key}, serial {made.serial}")


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--trust", "places", multiple=True, metavar="KEYS",
              help="A public key, or a folder of some.  [default: those of PBC_KEYS]")  # fmt: skip
def verify(bundle: Path, places: tuple[str, ...]) -> None:
    """Say who signed BUNDLE, after verifying every file; fails if it is none of your keys."""
    keys = read_keys(os.pathsep.join(places)) if places else trust.configured()
    if keys is None:
        raise UsageError(
            f"no keys to verify with: --trust, or {trust.KEYS_VARIABLE}, names public keys"
        )
    opened = Bundle.open(bundle)
    signer = trust.verified(opened, keys)
    opened.verify()
    click.echo(
        f"{bundle} is signed by {signer.key.name} (key {signer.key.identity}), "
        f"serial {signer.serial}"
    )
