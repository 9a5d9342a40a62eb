"""How the local stack's one broker is set up: its properties, its JVM and its log. Written to files by `deploy.services`."""

from __future__ import annotations

from pathlib import Path

from gateway.contracts.settings import Settings

# Partitions of Kafka's own topics. Kafka's default of 50 costs seconds at the first start and is for clusters.
INTERNAL_PARTITIONS = 8
HEAP_MB = 512
# Ten times the calls of the JVM's own thresholds before code is optimised, in its own proportions: with those, compiling takes a third of a
# core for the first minute after a start, which whoever pays meanwhile wants.
COMPILER = (
    *("-XX:Tier4InvocationThreshold=50000", "-XX:Tier4MinInvocationThreshold=6000"),
    *("-XX:Tier4CompileThreshold=150000", "-XX:Tier4BackEdgeThreshold=400000"),
)
JAVA_OPTIONS = (
    *(f"-Xmx{HEAP_MB}m", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:+ExplicitGCInvokesConcurrent"),
    *COMPILER,
)
# The release that formats a data directory. Earlier versions of Fraudgate ran 4.3 and left no note of it.
RELEASE = "4.2"
LOGGING = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{ISO8601} %p %m (%c)%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
logger.start.name = kafka.server.KafkaRaftServer
logger.start.level = info
"""


def properties(settings: Settings, log_dir: Path) -> str:
    """The text of server.properties."""
    host, port, controller_port = settings.host, settings.kafka_port, settings.kafka_controller_port
    values = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{host}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{host}:{port}",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": log_dir,
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": 0,
        # With a linger (adaptive is the default) a broker that was killed and started again may flush a batch of before its coordinator was
        # loaded: "out of sync with the underlying log". Then no offset of that group is committed again until the next start.
        "group.coordinator.append.linger.ms": 0,
        "num.network.threads": 2,
        "num.io.threads": 4,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": INTERNAL_PARTITIONS,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": INTERNAL_PARTITIONS,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": INTERNAL_PARTITIONS,
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())
