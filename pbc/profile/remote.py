"""`pbc profile --on`: the same measurement on a board, where `pbc deploy` brought the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pbc.bundle import Bundle
from pbc.deploy.connection import Connection, Destination
from pbc.errors import PbcError, UsageError
from pbc.profile.measure import Profile, Tell
from pbc.profile.options import ProfileOptions
from pbc.util import strict_json

# Arguments: the folder of the deploy, how to deploy there, and what to call pbc with.
_SCRIPT = """\
folder=$1; deploy=$2; shift 2
if [ ! -x "$folder/bin/pbc" ]; then
    echo "nothing is deployed in $folder; '$deploy' brings the bundle there" >&2
    exit 1
fi
exec "$folder/bin/pbc" profile "$folder/bundle.pbc" "$@"
"""


def profile_on(
    destination: str, path: Path, options: ProfileOptions, ssh_options: Sequence[str], tell: Tell
) -> Profile:
    """Have the board measure the bundle that is active there, which must be this one.

    Raises PbcError where nothing, or another bundle, is deployed there.
    """
    for name in ("data", "weights"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is a file of this machine; with --on, noise is measured on")
    bundle = Bundle.open(path)
    connection = Connection(Destination.parse(destination), tuple(ssh_options))
    deploy = f"pbc deploy {path} {destination}"
    tell(f"measuring on {connection.destination}")
    words = ["sh", "-c", _SCRIPT, "sh", connection.destination.folder, deploy]
    printed = connection.run([*words, *_arguments(options)], b"")
    try:
        content = strict_json.loads(printed)
        digest = content["bundle"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise PbcError(
            f"{connection.destination.host} answered with no profile; is its pbc older? {deploy}"
        ) from error
    if digest != bundle.digest:
        raise PbcError(
            f"{connection.destination} has another bundle ({digest[:12]}) than {path} "
            f"({bundle.digest[:12]}); '{deploy}' brings it there"
        )
    return Profile({**content, "on": str(connection.destination)})


def _arguments(options: ProfileOptions) -> list[str]:
    """Return the words of the command on the board; PyTorch only if it was asked for."""
    arguments = ["--json", "--against", options.against or "none"]
    arguments += ["--optimizer", options.optimizer, "--rounds", str(options.rounds)]
    if options.batch is not None:
        arguments += ["--batch", str(options.batch)]
    if not options.torch_compile:
        arguments.append("--no-compile")
    for name in ("threads", "levels"):
        if numbers := getattr(options, name):
            arguments += [f"--{name}", ",".join(str(number) for number in numbers)]
    return arguments
