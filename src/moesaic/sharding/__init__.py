"""Sharding rules: one line of notation makes an operator DTensor-aware."""

from moesaic.sharding import library, quantized  # noqa: F401 -- register the rules of our own operators
from moesaic.sharding.admission import ShardingError
from moesaic.sharding.decide import rule_of
from moesaic.sharding.notation import NotationError, parse
from moesaic.sharding.places import on
from moesaic.sharding.proof.report import Record, Report
from moesaic.sharding.prove import prove
from moesaic.sharding.register import sharding_rule
from moesaic.sharding.rule import AxisRule, Rule

__all__ = [
    "AxisRule",
    "NotationError",
    "Record",
    "Report",
    "Rule",
    "ShardingError",
    "on",
    "parse",
    "prove",
    "rule_of",
    "sharding_rule",
]
