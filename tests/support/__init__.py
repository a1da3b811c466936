"""What tests share: servers, data, oracles. Nothing here is a test."""
