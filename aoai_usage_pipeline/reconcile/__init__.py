"""Whether everything is there and adds up. Each function gives the offending rows, with their coordinates; none of them means all is well."""
