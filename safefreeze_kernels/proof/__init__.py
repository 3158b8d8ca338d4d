"""The proof that frozen weights did not move: in memory, and between checkpoints on disk.

What audits checkpoints is named here, as ``from safefreeze_kernels import audit`` has it.
"""

from .audit import AuditReport, TensorChanges, compare, total_bytes
from .statement import Statement, attest, check

__all__ = ["AuditReport", "Statement", "TensorChanges", "attest", "check", "compare", "total_bytes"]
