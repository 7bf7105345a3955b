"""Pages that are made from records and docstrings."""

from faults.table import fault

# fmt: off
REPORT = "benchmarks/report.py"
NEW_RECORDS, STAGES = "report::new_records_fill_their_parts", "report::start_is_told_by_stage"

fault(
    "report-floor-in-microseconds", REPORT, '1e6 / r["floor_microseconds"]', 'r["floor_microseconds"]',
    "report::floors_and_shares",
)
fault(
    "report-start-of-other-runs", REPORT, 'row["kernel_cache"] == cache and row["tokens"] == 1',
    'row["kernel_cache"] == cache', STAGES,
)
fault("report-pairs-of-a-query", REPORT, "pairs * (n + 1)", "pairs * n", NEW_RECORDS)
fault(
    "report-peers-replace-our-own-run", REPORT, "if engine not in rates", "if True",
    "report::peers_of_the_same_run_count_before_those_of_another", NEW_RECORDS,
)
fault(
    "report-imports-with-the-first-token", REPORT, '"imports": whole - load - first', '"imports": whole - load',
    STAGES,
)
fault(
    "pages-parts-of-one-line", "benchmarks/pages.py", "flags=re.S)", "flags=0)",
    "report::a_changed_record_changes_pages_and_pictures",
)
fault(
    "pages-hidden-methods-shown", "tools/make_docs.py", 'not item.name.startswith("_")', "True",
    "docs::stubs_have_signature_docstring_and_public_methods_only",
)
