"""Options about who may link: secrets, which no text shows, and addresses that are open without one."""
from __future__ import annotations

import hashlib
import hmac
import warnings

import pytest

from llm_datadist import LLMConfig, LLMRole
from llm_datadist.options.admission import OpenAddresses
from llm_datadist.options.parser import EngineOptions
from llm_datadist.status import LLMParamInvalidError

SECRET, OTHER = "correct-horse-battery", "staple-for-the-others"
V2 = {"llm.EnableCacheManager": "1"}


def parse(options=None, environ=None):
    return EngineOptions.parse({**V2, **(options or {})}, LLMRole.MIX, 1, environ or {})


def key(secret):
    return hmac.new(secret.encode(), b"llm_datadist link key", hashlib.sha256).digest()


def test_none_is_the_default():
    assert parse().link_secrets == ()


def test_where_it_comes_from(tmp_path):
    """The option wins over the variable, that over the file."""
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n{OTHER}\n", encoding="utf-8")
    environ = {"LLM_DATADIST_SECRET_FILE": str(file)}
    assert parse(environ=environ).link_secrets == (key(SECRET), key(OTHER))
    environ["LLM_DATADIST_SECRET"] = OTHER
    assert parse(environ=environ).link_secrets == (key(OTHER),)
    assert parse({"llm.LinkSecret": f"{SECRET} {OTHER}"}, environ).link_secrets == (key(SECRET), key(OTHER))


def test_the_setting_of_the_config():
    config = LLMConfig()
    config.enable_cache_manager = True
    config.link_secret, config.listen_open = SECRET, "1"
    options = EngineOptions.parse(config.generate_options(), LLMRole.MIX, 1, {})
    assert options.link_secrets == (key(SECRET),) and options.open_addresses == OpenAddresses(every=True)
    assert SECRET not in repr(config)


@pytest.mark.parametrize("text", ["", " ", "short-secret", f"{SECRET} short", f"{SECRET} {OTHER} {SECRET}"])
@pytest.mark.parametrize("way", ["option", "variable", "file"])
def test_what_is_no_secret_is_refused_and_not_shown(text, way, tmp_path):
    file = tmp_path / "secret"
    file.write_text(text, encoding="utf-8")
    given = {"option": ({"llm.LinkSecret": text}, {}), "variable": ({}, {"LLM_DATADIST_SECRET": text}),
             "file": ({}, {"LLM_DATADIST_SECRET_FILE": str(file)})}[way]
    if way == "variable" and not text:
        assert parse(*given).link_secrets == ()         # an empty variable counts as absent
        return
    with pytest.raises(LLMParamInvalidError) as caught:
        parse(*given)
    assert not any(word in str(caught.value) for word in text.split() if word != "short")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LLMParamInvalidError, match="cannot be read: No such file"):
        parse(environ={"LLM_DATADIST_SECRET_FILE": str(tmp_path / "none")})


def test_nothing_shows_it():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = parse({"llm.LinkSecret": SECRET, "llm.LinkSecrets": "x"})
    shown = repr(options) + str(options) + "".join(str(entry.message) for entry in caught)
    assert SECRET not in shown and key(SECRET).hex() not in shown and repr(key(SECRET)) not in shown
    for value in (SECRET.encode(), [SECRET]):
        with pytest.raises(TypeError) as error:
            parse({"llm.LinkSecret": value})
        assert SECRET not in str(error.value)
        with pytest.raises(TypeError) as error:
            LLMConfig().link_secret = value
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("text, allowed, refused", [
    ("", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "@name"], ["0.0.0.0", "::", "10.0.0.1", "fe80::1"]),
    ("0", ["127.0.0.1"], ["10.0.0.1"]),
    ("1", ["127.0.0.1", "0.0.0.0", "::", "10.0.0.1"], []),
    ("10.0.0.0/8, fd00::/8", ["10.1.2.3", "fd00::1", "::1"], ["11.0.0.1", "0.0.0.0", "fe80::1"]),
    ("10.0.0.1", ["10.0.0.1"], ["10.0.0.2"]),
])
def test_where_may_be_listened_without_a_secret(text, allowed, refused):
    options = parse(environ={"LLM_DATADIST_OPEN": text})
    for ip in allowed:
        options.check_listen(ip)
    for ip in refused:
        with pytest.raises(LLMParamInvalidError, match="LLM_DATADIST_OPEN=1"):
            options.check_listen(ip)
        parse({"llm.LinkSecret": SECRET}, {"LLM_DATADIST_OPEN": text}).check_listen(ip)


@pytest.mark.parametrize("text", ["yes", "10.0.0.1/8", "10.0.0.1,", "2"])
def test_what_names_no_address(text):
    with pytest.raises(LLMParamInvalidError, match="LLM_DATADIST_OPEN"):
        parse(environ={"LLM_DATADIST_OPEN": text})
