"""Two ways in: the transactions topic and POST /score."""

from loadtest.senders.http import HttpReport, HttpSender
from loadtest.senders.kafka import KafkaReport, KafkaSender

__all__ = ["HttpReport", "HttpSender", "KafkaReport", "KafkaSender"]
