"""From a prompt to tokens: requests, sampling, the key/value cache, and the offline API."""
