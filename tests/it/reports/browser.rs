//! The page in headless Chromium. Where there is none, `scripts/test` leaves these tests out by name.

use std::{fs, process::Command};

use serde_json::Value;

use super::report;
use crate::helpers::{Lab, text_of};

/// What is looked at in the page, as JSON in its title: sorts every table by every column and back.
const PROBE: &str = r#"<script>
addEventListener("load", () => {
  const found = { unsorted: [], tables: 0, wide: [], pictures: 0, unnamed: [] };
  for (const details of document.querySelectorAll("details")) details.open = true;
  const region = document.querySelector(".scroll").getBoundingClientRect().right;
  const first = [...document.querySelector("table").tHead.rows[0].cells];
  found.visible = first.filter(head => head.getBoundingClientRect().right <= region + 1).map(head => head.textContent);
  for (const table of document.querySelectorAll("table")) {
    found.tables += 1;
    const heads = [...table.tHead.rows[0].cells];
    if (!heads.every(head => head.scope === "col")) found.unnamed.push("a head of table " + found.tables);
    for (const row of table.tBodies[0].rows) {
      if (row.cells.length !== heads.length) found.unnamed.push("a row of table " + found.tables);
      if (row.cells[0].scope !== "row") found.unnamed.push("a first cell of table " + found.tables);
    }
    if (!table.classList.contains("sortable")) continue;
    heads.forEach((head, column) => {
      for (const direction of ["ascending", "descending"]) {
        head.querySelector("button").click();
        const values = [...table.tBodies[0].rows].map(row => row.cells[column].dataset.sort ?? row.cells[column].textContent);
        const known = values.filter(value => value !== "");
        const numbers = known.every(value => !isNaN(value));
        const order = (a, b) => numbers ? a - b : a.localeCompare(b, "en", { numeric: true });
        const expected = [...known].sort(order);
        if (direction === "descending") expected.reverse();
        const last = values.slice(known.length).every(value => value === "");
        if (head.ariaSort !== direction || !last || known.some((value, i) => order(value, expected[i]) !== 0)) {
          found.unsorted.push(head.textContent + " " + direction + " " + values);
        }
      }
    });
  }
  for (const picture of document.querySelectorAll("svg")) {
    found.pictures += 1;
    const texts = ["title", "desc"].map(tag => picture.querySelector(tag)?.textContent ?? "");
    if (picture.getAttribute("role") !== "img" || texts.some(text => text.length < 10)) found.unnamed.push("a picture");
    if (/NaN|inf/.test(picture.innerHTML)) found.unnamed.push("a number in " + texts[0]);
  }
  const room = document.documentElement.clientWidth;
  found.wide = document.documentElement.scrollWidth > room ? [document.documentElement.scrollWidth, room] : [];
  found.room = room;
  found.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  found.headline = document.querySelector("h1").textContent;
  found.fold = document.querySelector(".cards li").getBoundingClientRect().bottom;
  document.title = "FOUND" + JSON.stringify(found) + "END";
});
</script>"#;

/// Opens the page of the golden comparison at a width and returns what the probe found.
fn opened(width: u32) -> Value {
    let lab = Lab::empty();
    let path = lab.path("report.html");
    report(&lab, &["--html", &text_of(&path)]).succeeds();
    let page = fs::read_to_string(&path).unwrap();
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(
            !page.replace("http://www.w3.org/2000/svg", "").contains(outside),
            "the page names {outside}"
        );
    }
    fs::write(&path, page.replace("</body>", &format!("{PROBE}</body>"))).unwrap();
    let output = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"])
        .arg(format!("--user-data-dir={}", lab.path("profile").display()))
        .arg(format!("--window-size={width},900"))
        .arg(format!("file://{}", path.display()))
        .output()
        .expect("chromium runs");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let console: Vec<&str> = errors.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert!(console.is_empty(), "the console is not empty: {console:?}");
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let title = dom.split_once("<title>FOUND").and_then(|(_, rest)| rest.split_once("END</title>"));
    let (found, _) = title.unwrap_or_else(|| panic!("the probe did not finish: {errors}\n{dom:.400}"));
    let found = found.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&found).unwrap_or_else(|e| panic!("{e}: {found}"))
}

fn is_whole(found: &Value) {
    for empty in ["unsorted", "wide", "unnamed", "fetched"] {
        assert_eq!(found[empty], Value::Array(Vec::new()), "{empty}");
    }
    // Two of branches; figures of four heat maps; worst linears; readers; two measurements; a run's stages.
    assert_eq!(found["tables"], 11);
    // Size against KL; errors by layer and by linear; four heat maps.
    assert_eq!(found["pictures"], 7);
    assert_eq!(found["headline"], "booklm: take gptq-4bit-64g-actorder_True");
    assert!(found["fold"].as_f64().unwrap() < 900.0, "the recommendation is on the first screen: {found}");
}

/// Whether a column of the first table is seen without scrolling.
fn shows(found: &Value, column: &str) -> bool {
    found["visible"].as_array().unwrap().iter().any(|name| name == column)
}

#[test]
fn the_page_is_whole_on_a_desk_with_chromium() {
    let found = opened(1280);
    assert!(shows(&found, "mean KL") && shows(&found, "readers"), "{found}");
    is_whole(&found);
}

#[test]
fn the_page_is_whole_on_a_phone_with_chromium() {
    let found = opened(390);
    assert!(found["room"].as_u64().unwrap() <= 520, "{found}");
    assert!(shows(&found, "mean KL") && shows(&found, "size"), "{found}");
    is_whole(&found);
}
