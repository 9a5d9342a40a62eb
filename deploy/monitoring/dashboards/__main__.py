"""`python -m deploy.monitoring.dashboards`."""

from __future__ import annotations

import sys

from deploy.monitoring.dashboards.commands import dashboards

sys.exit(dashboards(sys.argv[1:]))
