"""The command-line program `fraudgate`: one subcommand for each thing a person does.

A command's module is imported when the command runs, so that `fraudgate score` doesn't wait for Spark or MLflow to load.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from deploy import processes
from deploy.rollout.state import RolloutError
from deploy.toolchain import ToolMissingError, spark_env
from gateway.contracts.settings import ENV_PREFIX, SettingError, load_settings


@dataclass(frozen=True)
class Command:
    """`module:function` takes the arguments behind the command's name and returns the exit status.

    `spark`: it starts Spark in this process, which needs JAVA_HOME and PYSPARK_PYTHON in the environment. `calls`: it is a caller of the
    gateway, and asks the local proxy where that runs.
    """

    name: str
    module: str
    function: str
    help: str
    spark: bool = False
    calls: bool = False


GROUPS: dict[str, tuple[Command, ...]] = {
    "The stack": (
        Command(
            "up",
            "deploy.commands",
            "up",
            "start Kafka, Redis, schema registry and MLflow; --all adds feature jobs, gateway, case service, Prometheus, Alertmanager",
        ),
        Command("down", "deploy.commands", "down", "stop everything that up started"),
        Command("restart", "deploy.commands", "restart", "stop one service and start it again"),
        Command("status", "deploy.commands", "status", "what runs, on which port, and whether it is well"),
        Command("topics", "deploy.topics_command", "topics", "create the topics that are missing and register their schemas"),
        Command("alerts", "deploy.monitoring.command", "alerts", "what Prometheus finds wrong now, and the runbook of each alert"),
        Command(
            "deploy",
            "deploy.rollout.command",
            "deploy",
            "the next version of the gateway takes over without a lost request, or the old one goes on; --rollback, --status",
        ),
        Command("demo", "deploy.demo", "demo", "the whole pipeline, from an empty directory to a table of results"),
    ),
    "Scoring": (
        Command("serve", "gateway.commands", "serve", "run the gateway: POST /score and the transactions topic"),
        Command("reload", "gateway.commands", "reload", "replace the workers of the gateway that runs, one by one"),
        Command("score", "gateway.commands", "score", "score one transaction, given as JSON, and print the decision", calls=True),
        Command(
            "explain",
            "deploy.explain",
            "explain",
            "why a transaction was decided as it was, and what would have been approved instead",
        ),
    ),
    "Cases": (
        Command("cases", "gateway.cases.commands", "cases", "run the case service: review queue, labels, lists, webhooks"),
        Command("keys", "gateway.key_commands", "keys", "make, list and revoke API keys: create, list, revoke"),
    ),
    "Receipts": (
        Command("why", "deploy.history.why", "why", "the story of one decision, from its receipt: path, rules, features, labels"),
        Command("replay-decision", "deploy.history.replay", "replay_decision", "recompute decisions from their receipts"),
        Command("audit", "deploy.history.audit", "audit", "verify every receipt's hash and chain, or show who changed what"),
        Command(
            "maintain",
            "deploy.history.maintain",
            "maintain",
            "retention, compaction and vacuum of the Delta tables, every few hours",
        ),
        Command("erase", "deploy.history.erase", "erase", "erase one customer's data; the receipts' chain still verifies"),
    ),
    "Features": (
        Command("jobs", "feature_jobs.commands", "jobs", "run the Spark streams: bronze, silver, Redis, gold", spark=True),
        Command(
            "rebuild",
            "feature_jobs.commands",
            "rebuild",
            "restore Redis from the Delta tables, as of now or of any time",
            spark=True,
        ),
        Command(
            "training-set",
            "feature_jobs.history_commands",
            "training_set",
            "write features and labels of the past as a Delta version",
        ),
        Command("backfill", "feature_jobs.history_commands", "backfill", "compute features of any past period from silver"),
        Command(
            "parity",
            "feature_jobs.parity_commands",
            "parity",
            "recompute the features of logged receipts and compare them, to the bit",
        ),
        Command("capacity", "deploy.capacity", "capacity", "measure memory and rebuild time of a population of cards", spark=True),
    ),
    "Policy": (
        Command("policy", "gateway.policy.commands", "policy", "check a policy's folder, or show what it does in which order"),
        Command(
            "backtest",
            "deploy.history.backtest_command",
            "backtest",
            "decide the past again by a changed policy: hits, frauds, good customers, money, decisions that change",
        ),
    ),
    "Models": (
        Command(
            "train",
            "deploy.training",
            "train",
            "training set, XGBoost, ONNX, admission, MLflow registry, alias champion",
        ),
        Command(
            "retrain", "deploy.retraining", "retrain", "a challenger from the newest matured labels, once or every so many hours"
        ),
        Command(
            "evaluate",
            "deploy.evaluate",
            "evaluate",
            "train and test on a public data set, beside the published figures: ranking, calibration, money, plots",
        ),
        Command("pull", "model_export.registry_commands", "pull", "bring the promoted models to the gateway's model directory"),
        Command("publish", "model_export.registry_commands", "publish", "copy the gateway's model directory to file:// or s3://"),
        Command("models", "model_export.registry_commands", "models", "versions, aliases, admission, metrics, training data"),
        Command("promote", "model_export.registry_commands", "promote", "make an admitted version champion, challenger or shadow"),
        Command("rollback", "model_export.registry_commands", "rollback", "make the former champion champion again"),
        Command(
            "compare", "model_export.compare_commands", "compare_command", "champion against challenger on live receipts and labels"
        ),
        Command("drift", "model_export.drift_commands", "drift", "a day's report: how far payments are from the training rows"),
        Command("demote", "model_export.registry_commands", "demote", "take a challenger or a shadow out"),
    ),
    "Traffic": (
        Command(
            "route",
            "gateway.models.route_commands",
            "route",
            "share live traffic with the challenger, explore declines, let back in what the guard took out",
            calls=True,
        ),
    ),
    "Load": (
        Command(
            "simulate",
            "loadtest.commands",
            "simulate",
            "generate seeded transactions with fraud patterns, to Kafka, HTTP or a file",
            calls=True,
        ),
        Command(
            "loadtest",
            "deploy.loadtest",
            "loadtest",
            "the SLA scenario by Locust; exit status 1 when p99 or error budget is broken",
        ),
        Command(
            "replay", "loadtest.commands", "replay", "send a public data set through Kafka or HTTP at a chosen speed", calls=True
        ),
    ),
    "Faults": (
        Command("chaos", "deploy.chaos", "chaos", "a fault on the gateway that runs, and what it cost: overload"),
        Command(
            "soak",
            "deploy.soak.command",
            "soak",
            "minutes of constant load, a fault every two of them, and whether every promise was kept",
        ),
    ),
    "Benchmarks": (
        Command(
            "bench",
            "deploy.bench.command",
            "bench",
            "measure on this machine: all (gateway, peers, curve, with Spark), gateway, spark, jobs (Spark on one core), or policy",
            spark=True,
        ),
    ),
}


def usage() -> str:
    lines = ["fraudgate decides, while a customer waits at the till, whether a card payment is fraud.", ""]
    lines += ["usage: fraudgate COMMAND [OPTION ...]      fraudgate COMMAND --help tells a command's options", ""]
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {c.name:<14}{c.help}" for c in commands]
        lines.append("")
    lines.append("Settings are FRAUDGATE_* environment variables: docs/settings.md lists them.")
    return "\n".join(lines)


def ask_the_proxy() -> None:
    """Callers go through the local proxy while it runs, since either of the gateways behind it may have ended."""
    settings = load_settings()
    record = processes.read_record(settings.home_path / "run/proxy.json")
    if not settings.gateway_url and record is not None and processes.is_alive(record):
        os.environ[ENV_PREFIX + "GATEWAY_URL"] = settings.proxy


def main() -> int:
    """Exit status 2 for a wrong call or setting, else the command's own."""
    commands = {c.name: c for group in GROUPS.values() for c in group}
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage())
        return 0 if len(sys.argv) > 1 else 2
    command = commands.get(sys.argv[1])
    if command is None:
        print(f"fraudgate: there is no command {sys.argv[1]!r}; fraudgate --help lists them", file=sys.stderr)
        return 2
    try:
        if command.spark:
            os.environ.update(spark_env(load_settings().cache_path))
        if command.calls:
            ask_the_proxy()
        module = importlib.import_module(command.module)
        status = getattr(module, command.function)(sys.argv[2:])
    except SettingError as exc:
        print(f"fraudgate {command.name}: {exc}", file=sys.stderr)
        return 2
    except (ToolMissingError, RolloutError) as exc:
        print(f"fraudgate {command.name}: {exc}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as exc:
        print(f"fraudgate {command.name}: the Python package {exc.name} is not installed here; run make setup", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    assert isinstance(status, int)
    return status


def run() -> NoReturn:
    """The program: `main`, and its end.

    A thread of Arrow that reads a Delta table ahead calls Python for it, and aborts the process when the interpreter is just being taken
    down (status 134, in about one run of four). So nothing is taken down: what a command has begun it has ended when it returns. Spark
    has its own way of ending, and reads by itself.
    """
    status = main()
    if any(command.spark for group in GROUPS.values() for command in group if command.name in sys.argv[1:2]):
        sys.exit(status)
    logging.shutdown()
    # Whoever read it may have gone.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
