"""What everything else stands on: errors, memory, the native extension, patterns."""
