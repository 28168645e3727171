import pytest
from interpose.config import Config, Endpoint, address, endpoint
from interpose.errors import ConfigError


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text('host = "from.file"\napi_key = "filekey"\ntimeout = 7\n')
    monkeypatch.setenv("INTERPOSE_CONFIG", str(path))
    for name in ("INTERPOSE_HOST", "INTERPOSE_API_KEY", "NDIF_HOST", "NDIF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return path


def test_code_then_environment_then_file(file, monkeypatch):
    config = Config()
    assert (config.HOST, config.api_key, config.TIMEOUT) == ("from.file", "filekey", 7.0)
    monkeypatch.setenv("NDIF_HOST", "from.ndif")
    assert config.host == "from.ndif"
    monkeypatch.setenv("INTERPOSE_HOST", "from.env")
    assert config.HOST == "from.env"
    config.host = "from.code"
    assert config.HOST == "from.code"
    config.HOST = None
    assert config.host == "from.env"
    monkeypatch.setenv("INTERPOSE_HOST", "  ")
    assert config.host == "from.ndif"


def test_a_changed_file_is_read_again(file):
    config = Config()
    assert config.PROGRESS is True
    file.write_text("progress = false\n# longer\n")
    assert config.PROGRESS is False


def test_mistakes_are_named(file, monkeypatch):
    config = Config()
    with pytest.raises(ConfigError, match="did you mean HOST"):
        config.HOTS = "x"
    with pytest.raises(ConfigError, match=r"CONFIG\.TIMEOUT"):
        config.timeout = -1
    with pytest.raises(ConfigError, match="torch"):
        config.BACKEND = "jax"
    monkeypatch.setenv("INTERPOSE_PROGRESS", "perhaps")
    with pytest.raises(ConfigError, match="INTERPOSE_PROGRESS"):
        _ = config.PROGRESS
    file.write_text("host = [")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        _ = config.HOST
    file.unlink()
    with pytest.raises(ConfigError, match="isn't there"):
        _ = config.HOST


def test_the_key_is_never_shown(file):
    assert "filekey" not in repr(Config())
    assert "filekey" not in repr(endpoint())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("lab.example.org", "https://lab.example.org"),
        ("lab.example.org:8443/", "https://lab.example.org:8443"),
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://lab.example.org", "http://lab.example.org"),
        ("https://example.org/interpose/", "https://example.org/interpose"),
        (" 192.168.1.5 ", "https://192.168.1.5"),
    ],
)
def test_hosts_as_people_write_them(host, url):
    assert address(host) == url


@pytest.mark.parametrize(
    "host", ["", "ftp://x", "http://", "x:port", "http://[::1", "http://me:pass@x", "http://x?y=1"]
)
def test_what_is_no_host_is_refused(host):
    with pytest.raises(ConfigError, match="isn't a host"):
        address(host)


def test_endpoints(file):
    assert endpoint("localhost:1", "k") == Endpoint("http://localhost:1", "k")
    assert endpoint("localhost:1").local
    assert not endpoint().local
    assert endpoint(api_key=" k\n").key == "k"
    for key in ("a\nb", "clé", "a b"):
        with pytest.raises(ConfigError, match="copy it again"):
            endpoint("localhost:1", key)
