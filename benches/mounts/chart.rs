//! A chart of time by size, as SVG. Both axes are logarithmic, so linear growth has the slope 1.

use std::fmt::Write as _;

use crate::report::Report;
use crate::sizes::{MIB, SIZES};
use crate::whole_process as whole;

const LINES: [(&str, &str); 8] = [
    (whole::PIPELINE, "#c0392b"),
    (whole::FSVERITY, "#e59866"),
    (whole::MEMFD_XZ, "#8e44ad"),
    (whole::MEMFD_ZSTD, "#2980b9"),
    (whole::MEMFD, "#145a32"),
    (whole::RAMFS, "#58b368"),
    (whole::PLAIN_COMPOSEFS, "#999999"),
    (whole::PLAIN, "#222222"),
];

/// The plot, in pixels: left, top, width, height. To its right are the names of the lines.
const PLOT: (f64, f64, f64, f64) = (76.0, 20.0, 480.0, 400.0);
const TIMES: (f64, f64) = (0.5, 20_000.0);

pub fn by_size(report: &Report) -> String {
    let (left, top, width, height) = PLOT;
    let scale = |value: f64, from: f64, to: f64| (value / from).ln() / (to / from).ln();
    let megabytes = SIZES.map(|size| (size / MIB) as f64);
    let x = |mb: f64| left + width * scale(mb, megabytes[0], megabytes[SIZES.len() - 1]);
    let y = |ms: f64| top + height * (1.0 - scale(ms, TIMES.0, TIMES.1));

    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 900 460\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"900\" height=\"460\" fill=\"white\"/>\n",
    );
    for mb in megabytes {
        let x = x(mb);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {top}v{height}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mb} MB</text>",
            top + height + 18.0,
        );
    }
    for ms in [1.0, 10.0, 100.0, 1000.0, 10_000.0] {
        let y = y(ms);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {y:.1}h{width}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{ms} ms</text>",
            left - 6.0,
            y + 4.0,
        );
    }
    let mut names = Vec::new();
    for (name, colour) in LINES {
        let points: Vec<_> = SIZES
            .iter()
            .zip(megabytes)
            .filter_map(|(size, mb)| Some((x(mb), y(report.median(&whole::group(*size), name)?))))
            .collect();
        let Some((_, end)) = points.last() else { continue };
        names.push((*end, name, colour));
        let path: String = points.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.trim_end(),
        );
    }
    // Each name beside the end of its line, below the one before.
    names.sort_by(|one, other| one.0.total_cmp(&other.0));
    let mut lowest = 0.0_f64;
    for (end, name, colour) in names {
        lowest = (lowest + 16.0).max(end + 4.0);
        let x = left + width + 8.0;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{lowest:.1}\" fill=\"{colour}\">{name}</text>");
    }
    svg + "</svg>\n"
}
