"""Look after outputs and machines: doctor, publish, rollback, gc, fsck."""
