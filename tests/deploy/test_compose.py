"""Image, compose files, units, manifests and `docs/deploy.md`, without a Docker engine."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedlora.cli.main import app
from fedlora.config.load import parse_job

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
COMPOSE = sorted([*ROOT.glob("docker-compose*.yml"), *(ROOT / "deploy" / "compose").glob("*.yml")])
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").rglob("*.yaml"))
PAGE = ROOT / "docs" / "deploy.md"
PODS = {"StatefulSet", "Job"}


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(kinds):
    found = [(p, d) for p in MANIFESTS for d in documents(p) if d["kind"] in kinds]
    # a patch is no whole object
    return [pytest.param(d, id=d["metadata"]["name"]) for p, d in found if p.name != "patch.yaml"]


def shell_commands(text):
    """Argument lists of `fedlora` in shell text, without variables that stand for options."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        found = re.search(r"(?:^|\|\| |exec |bin/)fedlora ((?!.*\bfrom\b).*)", line.strip())
        if found and not line.lstrip().startswith(("#", "ln ", "image", "Description")):
            yield [word for word in shlex.split(found[1], comments=True) if word != "$@"]


def commands():
    for path in [*SCRIPTS, *UNITS]:
        for words in shell_commands(path.read_text()):
            yield path.name, words
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for words in shell_commands(block):
            yield PAGE.name, words
    for path in COMPOSE:
        for service in yaml.safe_load(path.read_text())["services"].values():
            if "command" in service:
                yield (
                    path.name,
                    [re.sub(r"\$\{DEVICE:-(\w+)\}", r"\1", w) for w in service["command"]],
                )
    for parameter in of_kind(PODS):
        [container] = parameter.values[0]["spec"]["template"]["spec"]["containers"]
        yield parameter.id, container["args"]


COMMANDS = list(commands())


@pytest.mark.parametrize(("where", "words"), COMMANDS)
def test_every_command_is_taken_by_the_program(where, words):
    command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, f"{where}: no verb {name!r}"
        command = command.commands[name]
    # parses and checks everything, and calls nothing
    command.make_context(name, list(words))


def test_commands_are_found_everywhere():
    found = {where for where, _ in COMMANDS}
    assert {path.name for path in [*SCRIPTS, *UNITS]} <= found
    assert {"deploy.md", "site.yml", "fedlora-server", "fedlora-client", "fedlora-run"} <= found
    assert {"server", "client", "run", "certs"} <= {words[0] for _, words in COMMANDS}


def test_no_command_is_in_plain_text():
    for where, words in COMMANDS:
        assert "--insecure" not in words, where
        if words[0] in ("server", "client", "run", "watch"):
            options = {word.partition("=")[0] for word in words}
            assert options & {"--certs", "--enrol"}, where


def test_compose_has_the_three_services_shut_in():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    assert set(services) == {"server", "client", "run"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["init"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "ports" not in service
    assert services["client"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert services["run"]["depends_on"] == {"client": {"condition": "service_healthy"}}
    named = {v.partition(":")[0] for s in services.values() for v in s["volumes"] if v[0] != "$"}
    assert named <= set(compose["volumes"])


def test_no_volume_with_a_key_is_shared_with_those_who_need_none():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    users = {
        name: {
            s
            for s, service in services.items()
            for v in service["volumes"]
            if v[: len(name)] == name
        }
        for name in ("server:", "clients:", "operator:")
    }
    assert users == {"server:": {"server"}, "clients:": {"client"}, "operator:": {"server", "run"}}


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_every_file_that_a_service_starts_is_in_the_image(path):
    dockerfile = (ROOT / "Dockerfile").read_text()
    [copied] = re.findall(r"^COPY (docker/.*) /usr/local/lib/fedlora/$", dockerfile, re.MULTILINE)
    inside = {f"/usr/local/lib/fedlora/{Path(name).name}" for name in copied.split()}
    named = set(re.findall(r"/usr/local/lib/fedlora/[\w.]+", path.read_text()))
    assert named <= inside
    for name in copied.split():
        assert (ROOT / name).is_file()


def test_the_final_stage_builds_nothing_and_is_not_root():
    text = (ROOT / "Dockerfile").read_text()
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
    final = text.rpartition("FROM ")[2]
    for tool in ("pip", "apt-get", "gcc", "make ", "git ", "curl"):
        assert tool not in final, tool
    users = re.findall(r"^USER (.*)$", final, re.MULTILINE)
    assert users == ["10001:10001"]
    assert final.index("USER") > max(final.rindex("RUN"), final.rindex("COPY"))
    assert '\nENTRYPOINT ["fedlora"]\n' in final


def test_the_classic_builder_takes_the_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"--mount=|<<|^# *syntax=|--chmod|--link", text, re.MULTILINE)


def test_everything_the_image_is_made_of_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = {line[1:] for line in ignored if line.startswith("!")}
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setup["package-dir"].values()) <= kept
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert name.partition("/")[0] in kept, name


@pytest.mark.parametrize("manifest", of_kind(PODS))
def test_every_pod_is_shut_in(manifest):
    pod = manifest["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {
        claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", ())
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("manifest", of_kind({"StatefulSet"}))
def test_probes_ask_the_health_port(manifest):
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"--health=0.0.0.0:{ports['metrics']}" in container["args"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        question = container[probe]["httpGet"]
        assert question["port"] == "metrics"
        assert question["path"] in ("/health", "/ready")


def test_the_manifests_hold_together():
    """Selectors pick pods that exist, ports are open, kustomizations name files that exist."""
    pods, services, policies = (
        {p.values[0]["metadata"]["name"]: p.values[0]["spec"] for p in of_kind({kind})}
        for kind in ("StatefulSet", "Service", "NetworkPolicy")
    )
    for name, spec in pods.items():
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert policies[name]["podSelector"]["matchLabels"] == labels
    [(name, service)] = services.items()
    assert service["selector"] == pods[name]["selector"]["matchLabels"]
    allowed = {port["port"] for rule in policies[name]["ingress"] for port in rule["ports"]}
    assert {port["port"] for port in service["ports"]} <= allowed
    for path in MANIFESTS:
        if path.name == "kustomization.yaml":
            [content] = documents(path)
            named = [
                *content.get("resources", ()),
                *(p["path"] for p in content.get("patches", ())),
            ]
            named += [f for g in content.get("configMapGenerator", ()) for f in g.get("files", ())]
            assert named or path.parent.name == "monitoring"
            for other in named:
                assert (path.parent / other).is_file(), f"{path}: {other}"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_follow_the_schema_of_kubernetes(path):
    """Oracle: the published schemas, for kinds that are Kubernetes' own."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not here")
    for document in documents(path):
        group = document["apiVersion"].partition("/")[0]
        if group in ("v1", "apps", "batch", "networking.k8s.io") and path.name != "patch.yaml":
            validate.validate(document, "1.31", strict=True)


def test_the_job_of_the_manifests_is_valid():
    parse_job(tomllib.loads((ROOT / "deploy" / "kubernetes" / "run" / "job.toml").read_text()))


@pytest.mark.parametrize(
    "path", re.findall(r"(?:deploy|docker)[\w/.-]*\.(?:yml|service)", PAGE.read_text())
)
def test_every_file_the_page_names_exists(path):
    assert (ROOT / path).is_file()
