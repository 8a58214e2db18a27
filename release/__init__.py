"""What is done before a version is published: the wheel (:mod:`.wheel`), and the tests of it (:mod:`.versions`)."""
