"""What a classifier's weights reveal of its training data: reconstruction, membership, and the evidence."""

from kkt_jax.auditing.description import Fit, Residuals
from kkt_jax.auditing.files import read_samples
from kkt_jax.auditing.report import AuditReport, Leak
from kkt_jax.auditing.run import audit, AuditConfig
from kkt_jax.auditing.samples import Samples
from kkt_jax.auditing.unlearning import audit_unlearning, UnlearningReport
from kkt_jax.auditing.verdict import Verdict

__all__ = ["AuditConfig", "AuditReport", "Fit", "Leak", "Residuals", "Samples", "UnlearningReport", "Verdict", "audit"]
__all__ += ["audit_unlearning", "read_samples"]
