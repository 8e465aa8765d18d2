//! The picture: a row for each span, host and guest on one axis of time, as SVG text that needs nothing else. Knows
//! nothing of where spans come from.

use std::fmt::Write as _;

/// Whose time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Containerd,
    Shim,
    Vmm,
    Kernel,
    Agent,
    Container,
}

impl Who {
    const ALL: [Self; 6] = [Self::Containerd, Self::Shim, Self::Vmm, Self::Kernel, Self::Agent, Self::Container];

    /// What the legend says, and the colour.
    const fn shown(self) -> (&'static str, &'static str) {
        match self {
            Self::Containerd => ("ctr and containerd", "#8a8f98"),
            Self::Shim => ("shim", "#2f6fb5"),
            Self::Vmm => ("QEMU", "#c2702b"),
            Self::Kernel => ("guest's kernel", "#b0413e"),
            Self::Agent => ("agent", "#3f8f4f"),
            Self::Container => ("container's process", "#7a4fa3"),
        }
    }
}

/// Something that took time: milliseconds since the start began.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Span {
    pub(crate) who: Who,
    pub(crate) name: String,
    pub(crate) from: f64,
    pub(crate) to: f64,
}

/// One start.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(crate) title: String,
    pub(crate) spans: Vec<Span>,
}

impl Start {
    fn end(&self) -> f64 {
        self.spans.iter().map(|span| span.to).filter(|to| to.is_finite()).fold(0.0, f64::max)
    }
}

const WIDTH: f64 = 1240.0;
/// Names end here and bars begin.
const LEFT: f64 = 330.0;
/// Room for a duration after the longest bar.
const RIGHT: f64 = 80.0;
const ROW: f64 = 17.0;
const HEAD: f64 = 46.0;
/// Between two lines of the grid, ms.
const GRID: [f64; 6] = [10.0, 20.0, 50.0, 100.0, 200.0, 500.0];

/// Draws them one below the other, on one scale.
pub(crate) fn draw(starts: &[Start]) -> String {
    let longest = starts.iter().map(Start::end).fold(1.0, f64::max);
    let mut y = 30.0;
    let mut body = String::new();
    legend(&mut body);
    for start in starts {
        y = panel(&mut body, start, y + 24.0, longest);
    }
    if starts.is_empty() {
        y += 40.0;
        text(&mut body, (20.0, y), "start", "nothing was measured");
    }
    let height = y + 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

fn legend(body: &mut String) {
    for (index, who) in Who::ALL.into_iter().enumerate() {
        let (name, colour) = who.shown();
        let x = 20.0 + 170.0 * index as f64;
        rect(body, (x, 12.0, 12.0, 12.0), colour, name);
        text(body, (x + 18.0, 22.0), "start", name);
    }
}

/// One start from `top` on; returns where it ends.
fn panel(body: &mut String, start: &Start, top: f64, longest: f64) -> f64 {
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let mut spans: Vec<_> = start.spans.iter().filter(|s| s.from.is_finite() && s.to >= s.from).collect();
    spans.sort_by(|a, b| a.from.total_cmp(&b.from).then(a.to.total_cmp(&b.to)));
    let bottom = top + HEAD + ROW * spans.len() as f64;
    let title = format!("{}: {:.0} ms", start.title, start.end());
    let _ = writeln!(body, "<g font-size=\"15\" font-weight=\"bold\">");
    text(body, (20.0, top + 14.0), "start", &title);
    let _ = writeln!(body, "</g>");
    grid(body, (top + HEAD, bottom), start.end(), scale);
    for (index, span) in spans.into_iter().enumerate() {
        let y = top + HEAD + ROW * index as f64;
        let (x, width) = (LEFT + span.from * scale, ((span.to - span.from) * scale).max(1.0));
        let took = span.to - span.from;
        let (who, colour) = span.who.shown();
        text(body, (LEFT - 8.0, y + 12.5), "end", &span.name);
        let hint = format!("{who}: {}, {took:.1} ms, from {:.1} to {:.1}", span.name, span.from, span.to);
        rect(body, (x, y + 2.0, width, ROW - 4.0), colour, &hint);
        text(body, (x + width + 5.0, y + 12.5), "start", &format!("{took:.1}"));
    }
    bottom
}

/// Lines at round times, from the head of a panel to its end.
fn grid(body: &mut String, (top, bottom): (f64, f64), end: f64, scale: f64) {
    let step = GRID.into_iter().find(|step| step * scale >= 60.0).unwrap_or(1000.0);
    let mut at = 0.0;
    while at <= end {
        let x = LEFT + at * scale;
        let _ = writeln!(
            body,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#dddddd\"/>",
            top - 6.0
        );
        text(body, (x, top - 10.0), "middle", &format!("{at:.0}"));
        at += step;
    }
}

fn rect(body: &mut String, (x, y, width, height): (f64, f64, f64, f64), colour: &str, hint: &str) {
    let hint = escape(hint);
    let place = format!("x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"");
    let _ = writeln!(body, "<rect {place} fill=\"{colour}\"><title>{hint}</title></rect>");
}

fn text(body: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let words = escape(words);
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

/// What XML takes for itself, and what it cannot hold.
fn escape(words: &str) -> String {
    words.chars().filter(|c| !c.is_control()).fold(String::new(), |mut all, c| {
        match c {
            '&' => all += "&amp;",
            '<' => all += "&lt;",
            '>' => all += "&gt;",
            '"' => all += "&quot;",
            c => all.push(c),
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str, from: f64, to: f64) -> Span {
        Span { who: Who::Shim, name: name.into(), from, to }
    }

    fn drawn(spans: Vec<Span>) -> String {
        draw(&[Start { title: "cold".into(), spans }])
    }

    #[test]
    fn names_cannot_break_the_picture() {
        let picture = drawn(vec![span("a <b> & \"c\"\u{1b}[2J", 0.0, 1.0)]);
        assert!(picture.contains("a &lt;b&gt; &amp; &quot;c&quot;[2J"), "{picture}");
        assert!(!picture.contains("<b>") && !picture.contains('\u{1b}'), "{picture}");
    }

    #[test]
    fn rows_are_in_the_order_of_time() {
        let picture = drawn(vec![span("third", 5.0, 9.0), span("second", 2.0, 9.0), span("first", 2.0, 3.0)]);
        let places = ["first", "second", "third"].map(|name| picture.find(&format!(">{name}<")).expect(name));
        assert!(places.is_sorted(), "{picture}");
        assert!(picture.contains(">cold: 9 ms<"), "{picture}");
    }

    #[test]
    fn longer_is_wider_and_nothing_is_lost_in_the_picture() {
        let picture = drawn(vec![span("short", 0.0, 0.0), span("long", 0.0, 100.0)]);
        let width = WIDTH - LEFT - RIGHT;
        assert!(picture.contains("width=\"1.0\"") && picture.contains(&format!("width=\"{width:.1}\"")), "{picture}");
    }

    #[test]
    fn what_cannot_be_drawn_is_left_out() {
        let odd = vec![span("back", 5.0, 1.0), span("never", f64::NAN, 1.0), span("endless", 1.0, f64::INFINITY)];
        let picture = drawn(odd);
        assert!(!picture.contains("NaN") && !picture.contains("back<"), "{picture}");
        for empty in [draw(&[]), drawn(Vec::new())] {
            assert!(empty.starts_with("<svg ") && empty.ends_with("</svg>\n"), "{empty}");
        }
        assert!(draw(&[]).contains("nothing was measured"));
    }
}
