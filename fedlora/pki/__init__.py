"""The certificates of a federation: a small authority, keys, requests and revocation.

Keys are EC P-384: TLS takes them, and Flower takes them for the authentication of SuperNodes.
"""

from fedlora.pki.authority import Authority, Issued
from fedlora.pki.handout import answer_request, equip
from fedlora.pki.keys import KeyFiles, write_request
from fedlora.pki.revoked import Revoked
from fedlora.pki.subject import ROLES, Role, Subject

__all__ = [
    "ROLES",
    "Authority",
    "Issued",
    "KeyFiles",
    "Revoked",
    "Role",
    "Subject",
    "answer_request",
    "equip",
    "write_request",
]
