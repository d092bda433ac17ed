"""From raw events to daily bills: one request once, enriched and priced, then summed by day. Each table is one `.sql` file here."""
