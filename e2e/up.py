"""`make up`: from a fresh machine to a printed answer.

    tools and virtual environment, model     beside    Debian packages, Kubernetes (one Go build)
    cluster → chart (CRD, operator, gateway) → model in a claim → example service → one question

Idempotent: each step looks first whether its work is done. With `--kubeconfig` (or a kind or k3d cluster there), that
cluster is used and none is built.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from e2e import existing, model, product, venv
from e2e.cluster import cache, gobuild, images, packages, rig
from e2e.cluster.place import Place, this_place
from e2e.product import Target
from e2e.steps import Background, Progress, StepError, report_and_exit

HEARTBEAT_S = 30


def main(argv: list[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m e2e.up", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kubeconfig", type=Path, help="use this cluster instead of building one")
    options = parser.parse_args(argv)
    os.umask(0o022)
    place, progress = this_place(), Progress()
    other = existing.find(place, options.kubeconfig)
    if other is None:
        target = rig_target(place)
        everything(place, progress)
    else:
        progress.say(f"using the cluster of {other.kubeconfig} ({other.origin}); no control plane is built")
        target = existing.everything(other, place, progress)
    example(target, place, progress)
    write_environment(place, target)
    print(f"\nup in {progress.elapsed:.0f} s\n\n{how_to_go_on(place)}")
    return 0


def rig_target(place: Place) -> Target:
    """The rig, for the product."""
    return Target(
        kubectl=place.programs / "kubectl",
        helm=place.programs / "helm",
        kubeconfig=place.kubeconfig,
        engine_image=images.ENGINE_IMAGE,
        control_plane_image=images.CONTROL_PLANE_IMAGE,
        logs=place.logs,
    )


def everything(place: Place, progress: Progress) -> bool:
    """The rig with the product on it, ready for services; whether the cluster was brought up for it."""
    if not rig.status(place).whole:
        rig.down(place)
        rig.check_ports(place)
    programs = Background(lambda: _programs(place, progress))
    with progress.step("virtual environment"):
        venv.ensure(place)
    with progress.step("model"):
        model.ensure(place)
    programs.wait()
    with progress.step("cluster"):
        made = rig.up(place)
    target = rig_target(place)
    with progress.step("chart (CRD, operator, gateway)"):
        product.install(target, place.checkout)
        restart_if_changed(target, place)
    with progress.step("model in a claim"):
        product.provide_local_model(target, place)
    return made


def _programs(place: Place, progress: Progress) -> None:
    with progress.step("Debian packages"):
        packages.ensure(place)
    finished = threading.Event()
    threading.Thread(target=_heartbeat, args=(place, progress, finished), daemon=True).start()
    try:
        with progress.step("Kubernetes programs"):
            gobuild.ensure(place)
    finally:
        finished.set()


def _heartbeat(place: Place, progress: Progress, finished: threading.Event) -> None:
    while not finished.wait(HEARTBEAT_S):
        count = gobuild.compiled_packages(place.logs / "kubernetes-build.log")
        progress.say(f"Kubernetes programs: {count} packages compiled so far (from nothing it is about 2,900)")


def restart_if_changed(target: Target, place: Place) -> None:
    """Pods keep the code that they started with: after a change of the sources, those on the rig start anew."""
    mark = place.state / "sources"
    now = source_hash(place)
    before = mark.read_text() if mark.exists() else now
    mark.write_text(now)
    if before == now:
        return
    target.read("rollout", "restart", "deployment", "-n", product.NAMESPACE)
    for name in ("mainsail-operator", "mainsail-gateway"):
        target.read("rollout", "status", f"deployment/{name}", "-n", product.NAMESPACE, "--timeout=180s")
    target.read("delete", "pods", "-n", "default", "-l", "app.kubernetes.io/managed-by=mainsail", "--wait=false")


def source_hash(place: Place) -> str:
    """Of everything that the containers run."""
    files = sorted(file for source in place.sources for file in source.rglob("*.py"))
    return cache.key_of(*(part for file in files for part in (str(file), file.read_bytes())))


def example(target: Target, place: Place, progress: Progress) -> None:
    """The example service, and one question to it."""
    with progress.step(f"InferenceService {product.EXAMPLE_NAME}"):
        product.start_example(target)
        product.wait_routed("127.0.0.1", place.gateway_port)
    progress.say(f"asking through the gateway: {product.QUESTION}")
    answer = ""
    sys.stdout.write("\n    ")
    for piece in product.ask("127.0.0.1", place.gateway_port, product.QUESTION):
        answer += piece
        sys.stdout.write(piece.replace("\n", "\n    "))
        sys.stdout.flush()
    print()
    if not answer.strip():
        raise StepError("the answer is empty", do="see the engine's log: .run/log/pods")


def write_environment(place: Place, target: Target) -> None:
    """.run/env, to be sourced."""
    place.environment.parent.mkdir(parents=True, exist_ok=True)
    place.environment.write_text(
        f"export KUBECONFIG='{target.kubeconfig}'\n"
        f"export MAINSAIL_URL='{place.gateway_url}'\n"
        f"export MAINSAIL_MODEL='{model.path_of(place)}'\n"
        f"export PATH='{target.kubectl.parent}':\"$PATH\"\n"
    )


def how_to_go_on(place: Place) -> str:
    """What a newcomer may type next, as it works from this shell."""
    message = '[{"role": "user", "content": "Tell me about the sea."}]'
    python = (
        f'import openai; client = openai.OpenAI(base_url="{place.gateway_url}/v1", api_key="none"); '
        f'chunks = client.chat.completions.create(model="{product.EXAMPLE_NAME}", messages={message}, stream=True); '
        '[print(chunk.choices[0].delta.content or "", end="", flush=True) for chunk in chunks if chunk.choices]'
    )
    return f"""How to go on (the first line sets KUBECONFIG, MAINSAIL_URL and MAINSAIL_MODEL, and puts kubectl on PATH):

  source {place.environment}
  kubectl get mis
  kubectl apply -f {product.EXAMPLE}
  curl -N {place.gateway_url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{product.EXAMPLE_NAME}", "stream": true, "max_tokens": 64, "messages": {message}}}'
  {place.venv}/bin/python -c '{python}'

  make test    # everything that is checked
  make down    # ends all of it
"""


if __name__ == "__main__":
    report_and_exit(lambda: main(sys.argv[1:]))
