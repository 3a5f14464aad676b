"""Every metric that the services promise, with its labels beside ``model_name``; the end-to-end tests scrape them."""

DECODE = {
    "cairn_prompt_tokens_total": set(),
    "cairn_prompt_tokens_by_source_total": {"source"},
    "cairn_cache_misses_total": {"reason"},
    "cairn_generation_tokens_total": set(),
    "cairn_request_success_total": {"finished_reason"},
    "cairn_decode_bytes_read_total": set(),
    "cairn_decode_bytes_flat_total": set(),
    "cairn_time_to_first_token_seconds_bucket": {"le"},
    "cairn_inter_token_latency_seconds_bucket": {"le"},
    "cairn_e2e_request_latency_seconds_bucket": {"le"},
    "cairn_request_queue_time_seconds_bucket": {"le"},
    "cairn_request_prefill_time_seconds_bucket": {"le"},
    "cairn_request_decode_time_seconds_bucket": {"le"},
    "cairn_num_requests_running": set(),
    "cairn_num_requests_waiting": set(),
    "cairn_kv_cache_usage_perc": set(),
    "cairn_kv_pages": {"owner"},
    "cairn_chunks_resident": set(),
}

PREFILL = {
    "cairn_prefill_chunks_total": {"outcome"},
    "cairn_prefill_tokens_total": {"source"},
    "cairn_prefill_seconds_bucket": {"le"},
    "cairn_store_up": set(),
    "cairn_store_bytes": set(),
    "cairn_store_capacity_bytes": set(),
    "cairn_store_entries": set(),
    "cairn_store_evictions_total": set(),
}

EXPORTED = {**DECODE, **PREFILL}
