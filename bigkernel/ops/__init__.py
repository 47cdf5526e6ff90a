"""The ops: one file each, with schema, argument checks, fake, autograd and the public function."""
