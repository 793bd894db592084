// A Grafana dashboard on a page: each panel drawn by Grafana's own components from what Prometheus answers.
//
// ./dashboard.json?prometheus=URL&seconds=N&scrape=N: the last N seconds. The body says `data-state`: "drawn", or
// "failed: " and why. A panel without a value says `data-empty` and its title. Only what the chart's dashboard uses is
// known here: one query for each panel, stat, bargauge and timeseries, variables that are all "All".
import {
  createTheme, dateTime, type Field, FieldColorModeId, type FieldConfig, FieldType, getDisplayProcessor, toDataFrame,
  ThemeContext, type TimeRange, VizOrientation,
} from '@grafana/data';
import {
  BarGauge, BigValue, BigValueColorMode, BigValueGraphMode, BigValueJustifyMode, PanelChrome, TimeSeries,
} from '@grafana/ui';
import { BarGaugeDisplayMode, LegendDisplayMode } from '@grafana/schema';
import { createRoot } from 'react-dom/client';

type Panel = {
  id: number; type: string; title: string; gridPos: { x: number; y: number; w: number; h: number };
  fieldConfig: { defaults: FieldConfig }; targets: { expr: string; legendFormat: string }[];
};
type Series = { labels: Record<string, string>; times: number[]; values: (number | null)[] };

const asked = new URLSearchParams(location.search);
const scrapeSeconds = Number(asked.get('scrape'));
const theme = createTheme({ colors: { mode: 'light' } });
// In pixels. Grafana's grid has 24 columns, and rows of this height.
const COLUMN = 64;
const ROW = 38;
const GAP = 8;

async function ask(expr: string, range: TimeRange): Promise<Series[]> {
  // What Grafana puts for the variables, and its shortest interval of a rate.
  const query = expr.replaceAll(/\$(node|volume)\b/g, '.*').replaceAll('$__rate_interval', `${4 * scrapeSeconds}s`);
  const words = new URLSearchParams({
    query, step: `${scrapeSeconds}`, start: `${range.from.unix()}`, end: `${range.to.unix()}`,
  });
  const answer = await (await fetch(`${asked.get('prometheus')}/api/v1/query_range?${words}`)).json();
  if (answer.status !== 'success') {
    throw new Error(`${answer.error}: ${query}`);
  }
  return answer.data.result.map((one: { metric: Record<string, string>; values: [number, string][] }) => ({
    labels: one.metric,
    times: one.values.map(([at]) => at * 1000),
    values: one.values.map(([, text]) => (Number.isFinite(Number(text)) ? Number(text) : null)), // a quantile of nothing
  })).filter((series: Series) => series.values.some((value) => value !== null));
}

function nameOf(panel: Panel, series: Series): string {
  const text = panel.targets[0].legendFormat.replaceAll(/{{\s*(\w+)\s*}}/g, (_, label) => series.labels[label] ?? '');
  return text || panel.title;
}

function fieldOf(panel: Panel, series: Series, index: number): Field {
  const config: FieldConfig = {
    ...panel.fieldConfig.defaults, displayName: nameOf(panel, series),
    color: { mode: FieldColorModeId.Fixed, fixedColor: theme.visualization.palette[index] },
  };
  const field: Field = { name: nameOf(panel, series), type: FieldType.number, values: series.values, config };
  return { ...field, display: getDisplayProcessor({ field, theme }) };
}

function Content({ panel, found, range, width, height }: {
  panel: Panel; found: Series[]; range: TimeRange; width: number; height: number;
}) {
  const fields = found.map((series, index) => fieldOf(panel, series, index));
  if (fields.length === 0) {
    return <div data-empty={panel.title} style={{ textAlign: 'center' }}>No data</div>;
  }
  if (panel.type === 'timeseries') {
    const frames = found.map((series, index) => toDataFrame({
      fields: [{ name: 'time', type: FieldType.time, values: series.times }, fields[index]],
    }));
    return <TimeSeries frames={frames} timeRange={range} timeZone="utc" width={width} height={height}
      legend={{ showLegend: true, displayMode: LegendDisplayMode.List, placement: 'bottom', calcs: [] }} />;
  }
  const last = (field: Field) => ({ ...field.display!(field.values.at(-1)), title: field.name });
  if (panel.type === 'bargauge') {
    return <>{fields.map((field) => (
      <BarGauge key={field.name} theme={theme} width={width} height={height / fields.length - 4} field={field.config}
        display={field.display} value={last(field)} text={{ titleSize: 14, valueSize: 14 }}
        orientation={VizOrientation.Horizontal} displayMode={BarGaugeDisplayMode.Basic} />))}</>;
  }
  return <BigValue theme={theme} width={width} height={height} value={{ ...last(fields[0]), title: undefined }}
    colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.None}
    justifyMode={BigValueJustifyMode.Auto} />;
}

async function main(): Promise<void> {
  const panels: Panel[] = (await (await fetch('./dashboard.json')).json()).panels;
  const to = dateTime();
  const from = dateTime(to).subtract(Number(asked.get('seconds')), 'seconds');
  const range: TimeRange = { from, to, raw: { from, to } };
  const answers = await Promise.all(panels.map((panel) => ask(panel.targets[0].expr, range)));
  const rows = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  createRoot(document.getElementById('dashboard')!).render(
    <ThemeContext.Provider value={theme}>
      <div style={{
        position: 'relative', width: 24 * COLUMN + GAP, height: rows * ROW + GAP, color: theme.colors.text.primary,
        background: theme.colors.background.canvas, fontFamily: theme.typography.fontFamily,
      }}>
        {panels.map((panel, index) => (
          <div key={panel.id} style={{
            position: 'absolute', left: panel.gridPos.x * COLUMN + GAP, top: panel.gridPos.y * ROW + GAP,
          }}>
            <PanelChrome title={panel.title} width={panel.gridPos.w * COLUMN - GAP} height={panel.gridPos.h * ROW - GAP}>
              {(width, height) => (
                <Content panel={panel} found={answers[index]} range={range} width={width} height={height} />)}
            </PanelChrome>
          </div>))}
      </div>
    </ThemeContext.Provider>);
  // Two frames later the browser has painted what React made of it.
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.state = 'drawn'; }));
}

main().catch((error) => { document.body.dataset.state = `failed: ${error}`; });
