"""nbdmirror: a synchronous two-node mirror of one block device, served over NBD.

Owns nothing but the version and one refusal: the assertions in this package are part of its safety
design, so it does not run in an interpreter that strips them.
"""

__version__ = "0.1.0"

if not __debug__:
    raise SystemExit(
        "nbdmirror: assertions are switched off (python -O or PYTHONOPTIMIZE); "
        "they are part of the safety design: start without that option"
    )
