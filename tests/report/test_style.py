"""What charts share: colours that follow the page, rows and stages with labels."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure

from depthprune.report import charts, style
from tests.report.runs import typed

SVG = '{http://www.w3.org/2000/svg}'


def test_svg_is_well_formed_takes_the_page_s_colours_and_is_repeatable(result):
  widths = typed(result).widths
  draw = lambda: style.svg(charts.width_chart(widths), 'Widths < 9', 'before & after')
  element = draw()
  assert ElementTree.fromstring(element).tag.endswith('svg')
  for colour in (style.INK, style.FIRST, style.FAINT):
    bare = element.replace(f'var(--{style.ROLES[colour]}, {colour})', '')
    assert colour not in bare
    assert bare != element
  assert element == draw()


def test_a_chart_says_what_it_is_and_its_labels_have_the_names_of_the_program(result):
  chart = charts.width_chart(typed(result).widths)
  root = ElementTree.fromstring(style.svg(chart, 'Widths < 9', 'before & after'))
  assert root.get('role') == 'img'
  assert [child.text for child in root[:2]] == ['Widths < 9', 'before & after']
  names = {
    ''.join(group[1].itertext()): group[0].text
    for group in root.iter(f'{SVG}g')
    if len(group) > 1 and group[0].tag == f'{SVG}title'
  }
  assert names['stage 1, block 0, first convolution'] == 'stage1/block0/conv1:3'
  assert not any(group.get('id') for group in root.iter(f'{SVG}g'))


def test_long_names_have_two_lines_on_a_telephone(result):
  chart = charts.width_chart(typed(result).widths, style.NARROW)
  (axes,) = chart.axes
  said = [label.get_text() for label in axes.get_yticklabels()]
  assert said[:2] == ['stem convolution', 'stage 1, block 0,\nfirst convolution']


def test_no_two_roles_share_a_colour():
  assert len(dict.fromkeys(style.ROLES.values())) == len(style.ROLES) == 8


@pytest.mark.parametrize(('rows', 'every'), [(12, 1), (27, 1), (54, 2), (110, 2)])
def test_labels_of_thin_rows_are_thinned_but_never_the_marked_one(rows, every):
  names = [f'exit{i:03}' for i in range(rows)]
  axes = Figure().subplots()
  style.name_rows(axes, names, style.thin(rows)[1], marked=names[5])
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == names[5 % every :: every]
  bold = [t.get_text() for t in axes.get_yticklabels() if t.get_fontweight() == 'bold']
  assert bold == [names[5]]


@pytest.mark.parametrize('rows', [1, 20, 54, 110])
def test_labelled_rows_are_as_far_apart_as_a_label_is_high(rows):
  height, every = style.thin(rows)
  assert height * every >= style.LABEL
  assert height <= style.ROW


def test_names_of_stages_are_left_out_where_they_would_overlap():
  stages = {f'gates-{i}': ([100 * i, 100 * i + 99], []) for i in range(12)}
  axes = Figure().subplots()
  style.name_stages([axes], stages)
  shown = [text.get_text().strip() for text in axes.texts]
  assert shown == [f'gates-{i}' for i in range(0, 12, 2)]
  assert len(axes.lines) == 12


def test_a_saved_chart_needs_no_page_and_no_font(result, tmp_path):
  widths = typed(result).widths
  for name in ('first.svg', 'second.svg'):
    style.save(charts.width_chart(widths), tmp_path / name)
  text = (tmp_path / 'first.svg').read_text()
  assert 'var(--' not in text
  assert '<text' not in text
  assert style.PAPER in text
  assert text == (tmp_path / 'second.svg').read_text()
