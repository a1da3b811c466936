"""Keys in a file, or in a directory with one file for each."""

from pathlib import Path

import pytest

from datacache.errors import Denied
from datacache.sources.keyfile import Keys, read_keys


def test_an_ini_file_has_keys_in_sections(tmp_path: Path) -> None:
    """[default] counts, another section when it is asked for."""
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = S%(x)s\n"
        "[other]\nAWS_ACCESS_KEY_ID=B\nAWS_SECRET_ACCESS_KEY=T\nAWS_SESSION_TOKEN=U\nregion=x\n"
    )
    assert read_keys(str(file)) == Keys("A", "S%(x)s")
    assert read_keys(str(file), section="other") == Keys("B", "T", "U")
    with pytest.raises(Denied, match=r"no section \[third\]"):
        read_keys(str(file), section="third")


def test_the_only_section_counts(tmp_path: Path) -> None:
    """A file with one section needs no name for it."""
    file = tmp_path / "credentials"
    file.write_text("[mine]\naccess_key=A\nsecret_key=S\n")
    assert read_keys(str(file)) == Keys("A", "S")


@pytest.mark.parametrize(
    "names",
    [
        ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        ("access-key", "secret-key", "token"),
        ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SECURITY_TOKEN"),
        ("fs.oss.accessKeyId", "fs.oss.accessKeySecret", "fs.oss.securityToken"),
    ],
)
def test_a_mounted_secret_has_one_file_for_each_key(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """The usual names of the three are known; line ends and other files do not matter."""
    for name, value in zip(names, "AST", strict=True):
        (tmp_path / name).write_text(value + "\n")
    (tmp_path / "..data").mkdir()
    (tmp_path / "endpoint").write_text("https://store")
    assert read_keys(str(tmp_path)) == Keys("A", "S", "T")


def test_rotation_is_seen_at_the_next_look(tmp_path: Path) -> None:
    """The projected directory's symbolic link is swapped: the keys are the new ones."""
    for number in "12":
        (tmp_path / number).mkdir()
        (tmp_path / number / "aws_access_key_id").write_text("A" + number)
        (tmp_path / number / "aws_secret_access_key").write_text("S" + number)
    link = tmp_path / "secret"
    link.symlink_to("1")
    assert read_keys(str(link)) == Keys("A1", "S1")
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(link)
    assert read_keys(str(link)) == Keys("A2", "S2")


@pytest.mark.parametrize(
    "text", ["", "[default]\naws_access_key_id=A\n", "hush hush", "[a]\nx\n", "[a]\n[a]\n"]
)
def test_a_file_without_keys_is_denied_and_not_quoted(tmp_path: Path, text: str) -> None:
    """The error names the file, never a line of it: lines are secrets."""
    file = tmp_path / "credentials"
    file.write_text(text)
    with pytest.raises(Denied, match="credentials") as caught:
        read_keys(str(file))
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_cannot_be_read_is_denied(tmp_path: Path) -> None:
    """A file that is not there, or is no text, has no keys."""
    with pytest.raises(Denied, match="No such file"):
        read_keys(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(Denied, match="UnicodeDecodeError"):
        read_keys(str(tmp_path / "binary"))


def test_keys_do_not_show_their_secret() -> None:
    """What is logged by accident tells the access key at most."""
    assert repr(Keys("AKIA", "hush", "hush")) == "<keys of AKIA>"
    assert "hush" not in f"{Keys('AKIA', 'hush')}"
