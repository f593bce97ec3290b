"""The accuracy report: its schema, the gates that turn it into an exit code, and how it reads.

files      the three files of a report
build      what can be computed from plain numbers, and the bytes of report.json
gates      limits against what was measured
markdown   report.md
schema     report.json's JSON Schema, shipped as schema.json and stable within a schema version
show       numbers and foreign text as people read them
"""
