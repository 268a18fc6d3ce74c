"""Closed forms, conservation laws, exact gradients and samplers, checked on this machine."""

from clagrange.verify import closed_forms, conservation, sampling  # each registers its checks, in this order
from clagrange.verify.check import CHECKS, Check
from clagrange.verify.runner import report, run, verify

__all__ = ["CHECKS", "Check", "closed_forms", "conservation", "report", "run", "sampling", "verify"]
