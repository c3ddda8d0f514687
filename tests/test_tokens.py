"""Tokens: made, hashed, found again; nothing else is taken, and nothing tells what was wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.errors import ConfigError, Unauthenticated
from lmdeploy_slo.gateway.identity import Identifier, authorization_of, name_in_auth_context, name_in_peer_certificate
from lmdeploy_slo.gateway.tokens import Tokens, new_token, read_tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_a_token_is_its_clients_and_no_other_is(file: Path) -> None:
    (alice, line), (bob, other), (stranger, _) = (new_token(name) for name in ("alice", "bob", "alice"))
    file.write_text(f"# who may call\n\n{line}   # since today\n{other}\n")
    tokens = read_tokens(file)
    assert tokens.client_of(alice) == "alice"
    assert tokens.client_of(bob) == "bob"
    for wrong in (stranger, "", "x", alice[:-1], alice + "A", alice.swapcase(), bob[:15] + alice[15:], "slo_ü_é"):
        assert tokens.client_of(wrong) is None


def test_the_file_holds_no_token(file: Path) -> None:
    token, line = new_token("alice")
    assert token[15:] not in line
    assert line.startswith(f"alice {token[4:14]} sha256:")


def test_a_name_may_have_two_tokens_while_one_replaces_the_other(file: Path) -> None:
    pairs = [new_token("alice") for _ in range(2)]
    file.write_text("\n".join(line for _, line in pairs))
    assert {read_tokens(file).client_of(token) for token, _ in pairs} == {"alice"}


def test_tokens_differ() -> None:
    assert len({new_token("a")[0] for _ in range(100)}) == 100


LINE = new_token("alice")[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alice", "line 1: NAME ID sha256:HEX is expected"),
        (f"\n{LINE} more", "line 2: NAME ID sha256:HEX is expected"),
        (LINE.replace("sha256", "md5"), "line 1: not an id and a hash"),
        (LINE[:-1], "line 1: not an id and a hash"),
        (f"{LINE}\n{LINE}", "stands here twice"),
        (LINE.replace("alice", "älice"), "is no name"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_by_line(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_tokens(file)
    assert LINE[-64:] not in str(caught.value)


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_tokens(file)


@pytest.mark.parametrize("name", ["", "a b", "#a", "a#b", "ä", "a" * 129, "a\n"])
def test_names_that_a_line_could_not_hold(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        new_token(name)


@given(st.text(max_size=80))
def test_any_text_is_nobodys_token(text: str) -> None:
    assert Tokens({}).client_of(text) is None


# -- from a call to a name ----------------------------------------------------


def test_a_token_is_demanded_where_there_are_tokens() -> None:
    token, line = new_token("alice")
    _, token_id, hashed = line.split()
    tokens = Tokens({token_id: ("alice", bytes.fromhex(hashed[7:]))})
    identifier = Identifier(lambda: tokens, certificates=True)
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert identifier.name_of(f"{scheme} {token}", lambda: "in-the-certificate") == "alice"
    texts = set()
    for wrong in (None, "", token, f"Basic {token}", "Bearer", "Bearer ", f"Bearer {token[:-1]}", f"Bearer {token} x"):
        with pytest.raises(Unauthenticated) as refusal:
            identifier.name_of(wrong, lambda: "in-the-certificate")
        texts.add(str(refusal.value))
    assert len(texts) == 1
    assert token not in texts.pop()


def test_without_tokens_the_certificate_counts_and_without_both_nobody_is_known() -> None:
    assert Identifier(certificates=True).name_of("Bearer x", lambda: "alice") == "alice"
    assert Identifier().name_of("Bearer x", lambda: "alice") is None
    assert not Identifier().certain
    assert Identifier(certificates=True).certain


def test_the_first_authorization_counts() -> None:
    assert authorization_of(None) is None
    assert authorization_of([("a", "b")]) is None
    assert authorization_of([("authorization", b"Bearer x"), ("authorization", "Bearer y")]) == "Bearer x"


@pytest.mark.parametrize(
    ("grpc_says", "ssl_says", "name"),
    [
        (
            {"peer_spiffe_id": [b"spiffe://a/b"], "x509_common_name": [b"cn"]},
            {"subjectAltName": (("DNS", "d"), ("URI", "spiffe://a/b")), "subject": ((("commonName", "cn"),),)},
            "spiffe://a/b",
        ),
        (
            {"x509_common_name": [b"cn"], "x509_subject_alternative_name": [b"d"]},
            {
                "subjectAltName": (("DNS", "spiffe://fake"),),
                "subject": ((("countryName", "x"),), (("commonName", "cn"),)),
            },
            "cn",
        ),
        (
            {"x509_common_name": [b""], "x509_subject_alternative_name": [b"d", b"e"]},
            {"subjectAltName": (("DNS", "d"),)},
            "d",
        ),
    ],
)
def test_the_name_in_a_certificate(grpc_says: dict[str, list[bytes]], ssl_says: dict[str, object], name: str) -> None:
    assert name_in_auth_context(grpc_says) == name
    assert name_in_peer_certificate(ssl_says) == name


def test_a_certificate_without_a_name_is_nobodys() -> None:
    for read in (name_in_auth_context, name_in_peer_certificate):
        with pytest.raises(Unauthenticated, match="has no name"):
            read({})
