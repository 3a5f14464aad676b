"""Whether answers have the same bits in every batch, and whether ``--strict`` has to see to it."""

from __future__ import annotations

from decode_service.options import DecodeOptions
from engine.check.rows import RowBits
from engine.run.backends import FLASHINFER
from serving.process.same_bits import SameBits

FEW_ROWS = "few requests are decoded by other kernels than many, so that last bits can differ; --strict prevents it"
THREADS = "a product of few rows is cut among {} threads; --threads 1 and --strict prevent it"
STRICT = "--strict: every decode step is padded to {} rows"
SPLITS = "FlashInfer splits keys by what else is in a step, so that last bits can differ, whatever --strict does"
COMPANY = (
    "products of experts, or of attention with soft caps, depend on what else is in a step, so that last bits can "
    "differ, whatever --strict does"
)
NEEDLESS = "--strict has nothing to add"


def needs_one_size(options: DecodeOptions, row_bits: RowBits | None) -> bool:
    """Whether steps are padded to one number of rows: if strict, unless rows are the same in steps of any size."""
    return options.strict and (row_bits is None or not row_bits.equal)


def same_bits(options: DecodeOptions, row_bits: RowBits | None, attention: str, rows_stand_alone: bool) -> SameBits:
    """What holds for this service over an ``attention`` backend.

    ``row_bits`` is what was found out about the model's products, None if nothing; ``rows_stand_alone`` whether a row
    has the same bits among any others in steps of one number of rows.
    """
    if attention == FLASHINFER:
        return SameBits(False, SPLITS)
    if row_bits is not None:
        needless = [NEEDLESS] if options.strict and row_bits.equal else []
        return SameBits(row_bits.equal, "; ".join([row_bits.reason, *needless]))
    if not rows_stand_alone:
        return SameBits(False, COMPANY)
    if not options.strict:
        return SameBits(False, FEW_ROWS)
    if options.device == "cpu" and options.threads > 1:
        return SameBits(False, THREADS.format(options.threads))
    return SameBits(True, STRICT.format(options.batch_max))
