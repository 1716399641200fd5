"""The per-client table: what clients keep between rounds, in memory or on disk."""

from vecfl.table.table import LARGE, Table, Tables

__all__ = ["LARGE", "Table", "Tables"]
