"""Secrets in texts: keys and tokens that a service issues with a prefix of its own, and private keys."""

import re

SECRETS = {
    "a private key": r"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----(?:[\s\S]{0,9000}?-----END [A-Z ]+-----)?",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{20,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Stripe key": r"\b[rs]k_(?:live|test)_[0-9A-Za-z]{16,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
"""What a secret is, and how it is spelled."""

ANY_SECRET = re.compile("|".join(SECRETS.values()))
_NAMED = {name: re.compile(pattern) for name, pattern in SECRETS.items()}


def secrets_in(text: str) -> list[str]:
    """The kinds of secrets that stand in `text`."""
    if ANY_SECRET.search(text) is None:
        return []
    return [name for name, pattern in _NAMED.items() if pattern.search(text)]
