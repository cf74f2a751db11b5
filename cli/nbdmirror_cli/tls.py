"""`nbdmirror tls`: this node's certificate for the peer channel, and what doctor says of it.

Owns the words about it. Must never show a key.
"""

import stat

import click

from nbdmirror import certificate
from nbdmirror.certificate import Certificate
from nbdmirror.config import Config
from nbdmirror.config_files import read_tls_key
from nbdmirror.errors import ConfigError, RefusedError
from nbdmirror_cli.doctor import FAIL, OK, WARN, Finding
from nbdmirror_cli.options import Source, config_options, json_option, print_json
from nbdmirror_cli.view import print_table, printable

WHAT = "certificate"


@click.group("tls")
def tls_group() -> None:
    """Make or show this node's certificate for the channel between the nodes.

    With `engine.tls = "on"` a node that names no certificate makes one for itself when it starts.
    It needs no authority: the nodes prove the mirror's key to each other, inside and bound to it.
    """


@tls_group.command("create")
@config_options
@click.option("--force", is_flag=True, help="Replace the one that is there.")
@json_option
def create(source: Source, *, force: bool, as_json: bool) -> None:
    """Make this node's own certificate, with a key of its own, beside the metadata.

    A running engine goes on with the old one until it is started again; nothing has to be done on
    the other node.
    """
    config = source.load(with_key=False)
    if config.engine.tls_certificate is not None:
        raise RefusedError(
            f"engine.tls_certificate = {config.engine.tls_certificate} is what this node uses: put "
            "the new one there, or take tls_certificate and tls_key out of the configuration"
        )
    path = config.tls_certificate
    made = certificate.make(path, config.mirror, config.me.name, replace=force)
    if as_json:
        print_json(_facts(config, made))
        return
    click.echo(printable(f"made {path}, valid until {made.not_after}"))
    click.echo(f"fingerprint (SHA-256): {made.fingerprint}")
    if config.engine.tls == "off":
        click.echo('It is not in use: engine.tls is "off"; set it to "on" on both nodes.')


@tls_group.command("show")
@config_options
@json_option
def show(source: Source, *, as_json: bool) -> None:
    """Show fingerprint, subject and validity of the certificate that this node uses."""
    config = source.load(with_key=False)
    found = _look(config)
    facts = _facts(config, found)
    if as_json:
        print_json(facts)
        return
    own = "made by this node" if facts["own"] else "engine.tls_certificate"
    rows = [
        ("file", f"{found.path} ({own})"),
        ("fingerprint", f"SHA-256 {found.fingerprint}"),
        ("subject", found.subject),
        ("issuer", found.issuer),
        ("valid", f"from {found.not_before} to {found.not_after}"),
        ("remark", str(facts["remark"])),
    ]
    print_table(f"certificate of node {config.me.name}", [row for row in rows if row[1]])


def _look(config: Config) -> Certificate:
    path = config.tls_certificate
    if config.engine.tls_certificate is None and not path.exists():
        raise RefusedError(
            f'there is no {path}: the node makes it at its next start with engine.tls = "on", or '
            "`nbdmirror tls create` now"
        )
    return certificate.read(path)


def _facts(config: Config, found: Certificate) -> dict[str, object]:
    """For JSON. Its keys stay."""
    own = config.engine.tls_certificate is None
    remark = certificate.remark(found, own=own, believed_by_ca=config.engine.tls_ca is not None)
    return {"tls": config.engine.tls, "own": own, **found.as_dict(), "remark": remark}


def certificate_remark(config: Config) -> list[str]:
    """What `config check` says of its dates, if anything."""
    if config.engine.tls == "off" or not config.tls_certificate.exists():
        return []
    return [text] if (text := str(_facts(config, _look(config))["remark"])) else []


def certificate_finding(config: Config) -> Finding:
    """Whether the certificate and its key can be read and by whom, and how long it is good."""
    own = config.engine.tls_certificate is None
    if own and not config.tls_certificate.exists():
        return Finding(WHAT, OK, f"{config.tls_certificate}: made when the node starts")
    if why := _open_key(config, own=own):
        remedy = "as it says; then, as others may have read it, a new one"
        return Finding(WHAT, FAIL, f"{config.tls_key}: {why}", remedy)
    try:
        found = certificate.read(config.tls_certificate)
    except ConfigError as error:
        return Finding(WHAT, FAIL, str(error), "put a certificate (PEM) there")
    by_ca = config.engine.tls_ca is not None
    if text := certificate.remark(found, own=own, believed_by_ca=by_ca):
        what, _, remedy = text.rpartition("; ")
        return Finding(WHAT, FAIL if found.expired and by_ca else WARN, what, remedy)
    return Finding(WHAT, OK, f"{found.path}, until {found.not_after}")


def _open_key(config: Config, *, own: bool) -> str:
    """Why the key is not this node's alone, "" if it is. Its own may be the engine's user's."""
    if own:
        mode = stat.S_IMODE(config.tls_key.lstat().st_mode)
        return f"its mode is {mode:04o}, expected 0600 (`chmod 0600`)" if mode & 0o077 else ""
    try:
        read_tls_key(config.tls_key)
    except ConfigError as error:
        return str(error)
    return ""
