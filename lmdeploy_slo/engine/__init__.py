"""Engines behind one protocol (`base.Engine`); each third-party engine lives in one module."""
