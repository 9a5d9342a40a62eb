"""Grafana's dashboards, made from code: `python -m deploy.monitoring.dashboards --write` writes the JSON and the tables of their page.

Each board is a module of plain data (`spec.Board`); `build` makes Grafana's JSON of it with Grafana's own foundation SDK, `checks` reads
that JSON back and says what is wrong with it. Who runs Grafana needs the JSON alone.
"""
