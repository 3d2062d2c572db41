"""What a user names in, pictures out: found, opened, decoded; whatever cannot be used says why."""
