import pytest

from depthprune import methods


@pytest.mark.parametrize('name', ['gates', 'trainable_gates'])
def test_a_method_is_found_by_its_file_or_the_last_word_of_it(name):
  assert methods.check(name) == 'trainable_gates'


def test_an_unknown_method_names_the_nearest():
  with pytest.raises(ValueError, match=r"no method 'gate'; nearest: \w*gates"):
    methods.check('gate')
